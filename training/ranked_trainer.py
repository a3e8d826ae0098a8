"""TRL's DPO trainer on ranked lists: a prompt with its K answers is one example.

TRL keeps the model, the reference and the log; the batch, the loss and the metrics are a list's.
This module imports trl at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.batches import TokenBatches
from training.labels import NORMALISED, PairTrainer, pair_losses
from training.plackett_luce import plackett_luce_loss
from training.ranked_lists import COLUMNS
from training.reference import LISTS
from training.shared_prefix import IGNORED, SharedPrefix

TOKENS = ("input_ids", "attention_mask", "completion_mask")


@dataclass(frozen=True, slots=True)
class Collator:
    """Lists of up to K answers as K rows each: all best ones first, then all second ones, and so
    on. Where a list is shorter, its best answer stands again, and none of its tokens is scored."""

    answers: int
    """K."""
    pad: int

    def __call__(self, lists: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`better` and `worse` (pairs,) are rows; `weight` is what a pair counts for: lists count
        alike, and the pairs of each."""
        rows: list[tuple[list[int], list[int]]] = []
        for rank in range(self.answers):
            for each in lists:
                told = each["answers_ids"]
                prompt, best = each["prompt_ids"], told[0]
                there = rank < len(told)
                answer = told[rank] if there else best
                rows.append(([*prompt, *answer], [*[0] * len(prompt), *[int(there)] * len(answer)]))
        batch = {
            "input_ids": _padded([ids for ids, _ in rows], self.pad),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in rows], 0),
            "completion_mask": _padded([scored for _, scored in rows], 0),
        }
        for side in ("better", "worse"):
            places = [
                place * len(lists) + n for n, each in enumerate(lists) for place in each[side]
            ]
            batch[side] = torch.tensor(places)
        for name in ("probability", "margin"):
            batch[name] = torch.tensor([value for each in lists for value in each[name]])
        sizes = [len(each["better"]) for each in lists]
        batch["weight"] = torch.tensor([1 / n / len(lists) for n in sizes for _ in range(n)])
        if "ref_chosen_logps" in lists[0]:
            chosen = [each["ref_chosen_logps"] for each in lists]
            others = [self._others(each) for each in lists]
            batch |= dict(zip(LISTS, map(torch.tensor, (chosen, others)), strict=True))
        return batch

    def _others(self, each: dict[str, Any]) -> list[float]:
        known = each["ref_rejected_logps"]
        return [*known, *[0.0] * (self.answers - 1 - len(known))]


def _padded(rows: list[list[int]], pad: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)


class RankedTrainer(TokenBatches, SharedPrefix, PairTrainer):
    """DPOTrainer on ranked lists that are tokens already."""

    _signature_columns: Any
    _metrics: Any
    accelerator: Any
    beta: float

    def __init__(self, loss: str, answers: int, **values: Any) -> None:
        self.loss, self.answers = loss, answers
        collate = Collator(answers, values["processing_class"].pad_token_id)
        super().__init__(data_collator=collate, **values)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS, *LISTS]

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Of the best answers (lists,), and of all others (lists, K − 1)."""
        trl: Any = super()
        both = trl.compute_ref_log_probs(model, {name: inputs[name] for name in TOKENS})
        ranked = torch.cat(both).view(self.answers, -1)
        return ranked[0], ranked[1:].T

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        scored = inputs["completion_mask"]
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        labels = given["input_ids"].masked_fill(scored == 0, IGNORED)
        outputs = model(**given, labels=labels, use_cache=False, fused_lm_head=True)
        # Virtual tokens stand before the prompt's own.
        logps = outputs.log_probs[:, -(scored.shape[1] - 1) :].sum(dim=1)
        if self.precompute_ref_logps:
            best, others = (inputs[name] for name in LISTS)
        else:
            best, others = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        gains = logps - torch.cat([best[None], others.T]).flatten()
        loss = self._list_losses(gains, inputs)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._tell(gains.detach(), logps.detach(), outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def _list_losses(self, gains: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Their mean; `gains` of the answers (rows,)."""
        lists = len(gains) // self.answers
        better, worse = inputs["better"], inputs["worse"]
        if self.loss == "plackett_luce":
            pairs: list[list[tuple[int, int]]] = [[] for _ in range(lists)]
            for row, other in zip(better.tolist(), worse.tolist(), strict=True):
                pairs[row % lists].append((row // lists, other // lists))
            scores = self.beta * gains.view(self.answers, lists)
            each = [plackett_luce_loss(scores[:, n], of) for n, of in enumerate(pairs)]
            return torch.stack(each).mean()
        if self.loss in NORMALISED:
            gains = gains / inputs["completion_mask"].sum(dim=1).clamp(min=1)
        apart = gains[better] - gains[worse]
        losses = pair_losses(self.loss, apart, self.beta, inputs["margin"], inputs["probability"])
        mean: Tensor = (inputs["weight"] * losses).sum()
        return mean

    def _tell(self, gains: Tensor, logps: Tensor, outputs: Any, inputs: dict[str, Any]) -> None:
        """Note the metrics: by TRL's names where they mean the same of a list as of a pair."""
        scored, better, worse = (inputs[n] for n in ("completion_mask", "better", "worse"))
        ranked = scored.any(dim=1).view(self.answers, -1)
        lists = ranked.shape[1]
        rewards = self.beta * gains
        apart = rewards[better] - rewards[worse]
        counted = inputs["weight"] * lists
        at_rank, of_all = rewards.view(self.answers, -1), logps.view(self.answers, -1)
        last = ranked.sum(dim=0)[None] - 1
        spread = outputs.entropy[:, -(scored.shape[1] - 1) :].detach()[scored[:, 1:].bool()]
        # Sums, and of how many they are.
        found = {
            "rewards/accuracies": ((counted * (apart > 0)).sum(), lists),
            "rewards/margins": ((counted * apart).sum(), lists),
            **{
                f"rewards/rank_{n + 1}": (at_rank[n][there].sum(), int(there.sum()))
                for n, there in enumerate(ranked)
            },
            "logps/chosen": (of_all[0].sum(), lists),
            "logps/rejected": (of_all.gather(0, last).sum(), lists),
            "entropy": (spread.sum(), len(spread)),
        }
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, (total, number) in found.items():
            mine = torch.stack([total, total.new_tensor(float(number))])
            of_every, count = self.accelerator.gather(mine[None]).sum(dim=0).tolist()
            if count:
                metrics[name].append(of_every / count)
