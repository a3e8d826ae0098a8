"""The loss of reward models, and TRL's trainer with it.

This module imports trl at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.trainer.reward_trainer import RewardTrainer

from training import shared_prefix
from training.batches import TokenBatches
from training.hooks import Tokenized
from training.reward_head import one_a_row, packed, shared_pairs
from training.shared_attention import NAME

LABELS = ("probability", "weight", "margin")
"""Columns of the pairs that the loss reads and the model does not."""

NAMES = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
"""TRL's names of metrics, and those it has for the same in DPO."""

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", *LABELS)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    probability: Tensor,
    weight: Tensor,
    margin: Tensor,
    centring: float,
) -> Tensor:
    """The mean over pairs of weight·[−p·log σ(z) − (1 − p)·log σ(−z)] + λ·(r_c + r_r)², in nats.

    z = r_c − r_r − m; all tensors have shape (pairs,). The first part is Bradley and Terry's
    likelihood for a label of probability p, least at r_c − r_r = m + logit(p) (Ouyang et al. 2022,
    eq. 1, has p = 1; the margin m is Touvron et al.'s, 2023, eq. 2). The second keeps rewards
    around 0, which differences alone leave open (Eisenstein et al. 2023, eq. 2); λ is `centring`.
    """
    z = chosen - rejected - margin
    losses = -probability * logsigmoid(z) - (1 - probability) * logsigmoid(-z)
    return (weight * losses).mean() + centring * ((chosen + rejected) ** 2).mean()


class PairRewardTrainer(TokenBatches, Tokenized, RewardTrainer):
    """TRL's trainer on pairs that are tokens already, with labels, margins and packing.

    TRL 1.16's is fit to build on: its loop, metrics and handling of adapters are kept. Its
    likelihood knows no soft labels and its model reads by the padding token, so those are ours.
    """

    model: Any
    _metrics: Any
    _signature_columns: Any
    centring: float = 0.0
    forward_pass: str | None = None
    """Which one runs and why, in words that the run says to people; None where one answer is a
    row."""

    def share(self) -> bool:
        """Compute each token of a batch once from now on, if that changes nothing but the time:
        whether it is so."""
        reason = shared_prefix.why_not(self.model)
        if reason is None:
            self.model.set_attn_implementation(NAME)
            self.data_collator = collator(shared=True)
            self.forward_pass = "shared: each prompt once, no padding"
        else:
            self.forward_pass = f"packed, with repeated prompts: {reason}"
        return reason is None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss above, on the rewards that TRL's own computation has read and counted."""
        given = {name: value for name, value in inputs.items() if name not in LABELS}
        trl: Any = super()
        _, outputs = trl.compute_loss(model, given, True, num_items_in_batch)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for theirs, usual in NAMES.items():
            metrics[usual] += metrics.pop(theirs)
        chosen, rejected = outputs.logits[:, 0].chunk(2)
        p, weight, margin = (inputs[name].to(chosen.dtype) for name in LABELS)
        loss = bradley_terry_loss(chosen, rejected, p, weight, margin, self.centring)
        return (loss, outputs) if return_outputs else loss


def collator(
    packing: bool = False, width: int | None = None, shared: bool = False
) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Rows of pairs into what the model and the loss take: all chosen answers, then all rejected.

    They share a row as `reward_head.shared_pairs` does, or `packed`, with `reward_head.row_width`'s
    `width`, or not at all.
    """

    def collate(rows: Sequence[Any]) -> dict[str, Any]:
        sequences = [
            [*row["prompt_ids"], *row[f"{answer}_ids"]]
            for answer in ("chosen", "rejected")
            for row in rows
        ]
        if shared:
            batch = shared_pairs(sequences)
        else:
            batch = packed(sequences, width) if packing else one_a_row(sequences)
        # Labels first: transformers takes the first tensor's length for the number of examples.
        labels = {
            name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
            for name in LABELS
        }
        return {**labels, **batch.tensors()}

    return collate
