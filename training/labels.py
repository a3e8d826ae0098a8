"""What a pair's label is worth to the loss: certain or probable, counted by pair or by prompt.

TRL 1.16 has hard labels only: its sigmoid loss ignores `label_smoothing`, which is one number for
all pairs besides. Here TRL computes the log-probabilities and the metrics as always, and the loss
of each pair is made from them. This module imports trl, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from training.hooks import PairTrainer

LABELS = ("probability", "weight")
"""Columns of the pairs that the loss reads and the model does not."""


def soft_label_loss(
    logits: torch.Tensor, probability: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The mean of weight·[−p·log σ(z) − (1 − p)·log σ(−z)], in nats; all of shape (pairs,).

    z is β·Δ and p is P(chosen beats rejected). A pair's loss is least at z = logit(p), so an unsure
    label asks for a small difference and not for an ever larger one (Mitchell 2023, "A note on DPO
    with noisy preferences", where 1 − p is one ε for all pairs). With p = 1 and weight 1 this is
    DPO's loss.
    """
    losses = -probability * logsigmoid(logits) - (1 - probability) * logsigmoid(-logits)
    return (weight * losses).mean()


class LabelledPairTrainer(PairTrainer):
    """DPO on pairs that have a probability and a weight each."""

    model: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.data_collator = _with_labels(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        trl: Any = super()
        unset = self._signature_columns is None
        trl._set_signature_columns_if_needed()
        if unset:
            self._signature_columns += LABELS

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        given = {name: value for name, value in inputs.items() if name not in LABELS}
        forwards: list[Any] = []
        trl: Any = super()
        hook = self.model.register_forward_hook(lambda *call: forwards.append(call[-1]))
        try:
            found = trl._compute_loss(model, given, return_outputs)
        finally:
            hook.remove()
        # The policy's forward pass comes first; the reference's second, unless it was made before.
        chosen, rejected = forwards[0].log_probs.sum(dim=1).chunk(2)
        if self.precompute_ref_logps:
            references = given["ref_chosen_logps"], given["ref_rejected_logps"]
        else:
            references = forwards[1].log_probs.sum(dim=1).chunk(2)
        logits = self.beta * ((chosen - references[0]) - (rejected - references[1]))
        soft = soft_label_loss(logits, inputs["probability"], inputs["weight"])
        # Only the pairs' own part is exchanged: with experts, TRL's loss also balances their load.
        change = soft + logsigmoid(logits).mean()
        return (found[0] + change, found[1]) if return_outputs else found + change


def _with_labels(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], Any]:
    def collate_all(rows: list[Any]) -> dict[str, Any]:
        labels = {name: torch.tensor([float(row[name]) for row in rows]) for name in LABELS}
        return {**collate(rows), **labels}

    return collate_all
