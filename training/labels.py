"""What a pair's label is worth to the loss: certain or probable, by which margin, counted by pair
or by prompt.

TRL 1.16 has certain labels that count alike: its sigmoid loss ignores `label_smoothing`, and no
loss of its takes a number of each pair's own. Here TRL computes the log-probabilities and the
metrics as always, and the loss of each pair is made from them. This module imports trl, so it is
imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import logsigmoid, relu
from trl.trainer.dpo_trainer import DPOTrainer

from training.hooks import Tokenized
from training.reference import CachedReference

LABELS = ("probability", "weight", "margin")
"""Columns of the pairs that the loss reads and the model does not."""

NORMALISED = ("sigmoid_norm", "ipo")
"""Losses of log-probabilities a token instead of an answer's sum."""

DISCOPOP_TAU = 0.05
"""The temperature of its mixture, as in the paper and in TRL."""


def label_losses(
    loss: str, difference: torch.Tensor, beta: float, margin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair if its label is true and if it is false, both of shape (pairs,).

    `difference` is Δ, summed or a token as the loss wants it. With z = β·Δ − margin they are
    −log σ(±z) (Rafailov et al. 2023, eq. 7; the margin is Amini et al.'s, 2024) and, for
    `hinge`, max(0, 1 ∓ z) (Zhao et al. 2023); for `ipo`, (Δ ∓ 1/(2β))² (Azar et al. 2024, eq. 17).
    """
    z = beta * difference - margin
    match loss:
        case "sigmoid" | "sigmoid_norm":
            return -logsigmoid(z), -logsigmoid(-z)
        case "hinge":
            return relu(1 - z), relu(1 + z)
        case "ipo":
            return (difference - 1 / (2 * beta)) ** 2, (difference + 1 / (2 * beta)) ** 2
    raise ValueError(f"no loss {loss!r} of single pairs")


def labelled_loss(
    true: torch.Tensor, false: torch.Tensor, probability: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The mean of weight·[p·true + (1 − p)·false]; all of shape (pairs,).

    p is P(chosen beats rejected). The sigmoid loss of a pair is then least at z = logit(p), so an
    unsure label asks for a small difference and not for an ever larger one (Mitchell 2023, "A note
    on DPO with noisy preferences", where 1 − p is one ε for all pairs), and IPO's at
    Δ = (p − ½)/β. With p = 1 and weight 1 it is the loss itself.
    """
    return (weight * (probability * true + (1 - probability) * false)).mean()


def pair_losses(
    loss: str,
    difference: torch.Tensor,
    beta: float,
    margin: torch.Tensor,
    probability: torch.Tensor,
) -> torch.Tensor:
    """The loss of each pair, of shape (pairs,), for any loss that looks at Δ alone.

    With z = β·Δ and p = P(chosen beats rejected), besides those of `label_losses`: `robust` is
    [p·(−log σ(z)) − (1 − p)·(−log σ(−z))]/(2p − 1) (Chowdhury et al. 2024, ε = 1 − p),
    `exo_pair` KL(σ(z), σ(−z) ‖ p, 1 − p) (Ji et al. 2024, eq. 16), and `discopop` the mixture of
    −log σ(z) and exp(−z) by σ(z/τ) (Lu et al. 2024, eq. 5).
    """
    z = beta * difference
    match loss:
        case "robust":
            true, false = -logsigmoid(z), -logsigmoid(-z)
            return (probability * true - (1 - probability) * false) / (2 * probability - 1)
        case "exo_pair":
            won, lost = logsigmoid(z), logsigmoid(-z)
            surprise = won - probability.log(), lost - (1 - probability).log()
            return won.exp() * surprise[0] + lost.exp() * surprise[1]
        case "discopop":
            mix = torch.sigmoid(z / DISCOPOP_TAU)
            return (1 - mix) * -logsigmoid(z) + mix * torch.exp(-z)
    true, false = label_losses(loss, difference, beta, margin)
    return probability * true + (1 - probability) * false


class PairTrainer(CachedReference, Tokenized, DPOTrainer):
    """DPOTrainer on pairs that are tokens already."""


class LabelledPairTrainer(PairTrainer):
    """DPO on pairs that have a probability, a weight and a margin each."""

    model: Any
    _signature_columns: Any

    def __init__(self, loss: str, *, args: Any, **values: Any) -> None:
        # TRL's own loss counts nothing; with experts, what balances their load stays.
        args.loss_type, args.loss_weights = ["sigmoid"], [0.0]
        super().__init__(args=args, **values)
        self.loss = loss
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
        gains = [chosen - references[0], rejected - references[1]]
        if self.loss in NORMALISED:
            lengths = given["completion_mask"].sum(dim=1).clamp(min=1).chunk(2)
            gains = [gain / length for gain, length in zip(gains, lengths, strict=True)]
        true, false = label_losses(self.loss, gains[0] - gains[1], self.beta, inputs["margin"])
        ours = labelled_loss(true, false, inputs["probability"], inputs["weight"])
        return (found[0] + ours, found[1]) if return_outputs else found + ours


def _with_labels(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], Any]:
    def collate_all(rows: list[Any]) -> dict[str, Any]:
        labels = {name: torch.tensor([float(row[name]) for row in rows]) for name in LABELS}
        return {**collate(rows), **labels}

    return collate_all
