"""ORPO's loss and the trainer that takes its mean (Hong et al. 2024).

TRL's own ORPO is experimental and counts the prompt's tokens into the likelihood term, so the loss
is written here; the chunked head and the training loop are TRL's, as for supervised fine-tuning.
This module imports trl at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.sft_trainer import SFTTrainer

from training.batches import TokenBatches
from training.hooks import Tokenized

IGNORED = -100
"""The label of a token that is not scored."""


def log_odds(log_prob: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log-probabilities, in nats, elementwise.

    1 - p is made as -expm1(log p): 1 - exp(log p) has no digits left where p is near 1. A p that
    rounds to 1 is taken as the largest number below 1, and its gradient as that number's, so that
    neither is infinite.
    """
    nearest = -torch.finfo(log_prob.dtype).eps
    below_one = log_prob + (log_prob.clamp(max=nearest) - log_prob).detach()
    return below_one - torch.log(-torch.expm1(below_one))


def odds_ratio_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ORPO's loss of each pair, its likelihood term and its log odds ratio, shape (pairs,), nats.

    `chosen` and `rejected` are log-probabilities of the answers divided by their numbers of tokens
    (eq. 3). The loss is -chosen - weight·log σ(log odds(chosen) - log odds(rejected)) (eq. 6, 7).
    """
    ratio = log_odds(chosen) - log_odds(rejected)
    return -chosen + weight * softplus(-ratio), -chosen, ratio


class PairCollator:
    """Pairs as one batch: first all chosen, then all rejected answers, each after its prompt.

    Only an answer's tokens, with the one that ends it, have labels.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each of shape (2 × pairs, longest)."""
        answered = [
            (row["prompt_ids"], row[f"{answer}_ids"])
            for answer in ("chosen", "rejected")
            for row in rows
        ]
        ids = [torch.tensor([*prompt, *answer]) for prompt, answer in answered]
        labels = [torch.tensor([*[IGNORED] * len(p), *answer]) for p, answer in answered]
        present = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad_sequence(present, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


class OddsRatioTrainer(TokenBatches, Tokenized, SFTTrainer):
    """SFTTrainer on pairs that are tokens already, with ORPO's loss."""

    model: Any
    _signature_columns: Any
    # The loss is a mean over pairs, so the mean over accumulated batches is the trainer's to take.
    loss_is_scaled_for_ga: Any = False

    def __init__(self, *args: Any, weight: float, **values: Any) -> None:
        super().__init__(*args, **values)
        self.weight = weight

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean of the pairs' losses; their terms become metrics."""
        outputs = model(**inputs, fused_lm_head=True)
        # Prompt tuning puts virtual tokens before the real ones.
        real = inputs["labels"].shape[1] - 1
        scored = inputs["labels"][:, 1:] != IGNORED
        log_probs = outputs.log_probs[:, -real:].sum(1) / scored.sum(1)
        chosen, rejected = log_probs.chunk(2)
        losses, likelihood, ratio = odds_ratio_loss(chosen, rejected, self.weight)
        with torch.no_grad():
            found = {
                "nll_loss": likelihood,
                "log_odds_ratio": ratio,
                "rewards/accuracies": (ratio > 0) + 0.5 * (ratio == 0),
                "logps/chosen": chosen,
                "logps/rejected": rejected,
            }
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, values in found.items():
                mean = self.accelerator.gather_for_metrics(values.float()).mean()
                metrics[name].append(float(mean))
        loss = losses.mean()
        return (loss, outputs) if return_outputs else loss
