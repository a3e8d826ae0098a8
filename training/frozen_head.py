"""Log-probabilities of tokens under a language head that does not train.

The gradient of log p with respect to the hidden state needs nothing that comes later, so it is made
together with log p: two products with the vocabulary's matrix instead of the three of computing the
logits again. This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HELD = {"cpu": 1 << 22, "cuda": 1 << 26}
"""How many logits are held at a time: such as fit a processor's caches, or fill a GPU."""


class FrozenHead(torch.autograd.Function):
    """(N,) log-probabilities of `targets` (N,) given `hidden` (N, H) and the head's `weight`
    (V, H), with the entropies and the mean logits of the distributions, and whether the target is
    the likeliest token.

    The logits z are W·h or, with `softcap` c, c·tanh(W·h/c). Only the log-probabilities have a
    gradient, and only with respect to `hidden`: ∂ log p_t/∂h = Σ_v (1[v = t] − p_v)·z'_v·W_v.
    """

    @staticmethod
    def forward(
        ctx: Any, softcap: float | None, hidden: Tensor, weight: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """N tokens at once at most as `HELD` allows."""
        device = hidden.device.type
        kind = hidden.dtype
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
        wide = torch.promote_types(kind, torch.float32)
        matrix = weight.to(kind)
        slopes = []
        told = []
        at_once = max(1, HELD.get(device, HELD["cuda"]) // len(weight))
        for start in range(0, max(1, len(hidden)), at_once):
            states = hidden[start : start + at_once].to(kind)
            target = targets[start : start + at_once]
            logits = (states @ matrix.T).to(wide)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            largest, likeliest = logits.max(-1)
            chances = torch.exp(logits - largest[:, None])
            total = chances.sum(-1)
            scale = largest + total.log()
            of_target = logits.gather(-1, target[:, None])[:, 0]
            entropy = scale - torch.linalg.vecdot(chances, logits) / total
            told.append((of_target - scale, entropy, logits.mean(-1), likeliest == target))
            if ctx.needs_input_grad[1]:
                rows = matrix[target].to(wide)
                if softcap is not None:
                    rows *= 1 - (of_target / softcap).square()[:, None]
                    chances *= 1 - (logits / softcap).square_()
                expected = (chances.div_(total[:, None]).to(kind) @ matrix).to(wide)
                slopes.append(rows - expected)
        ctx.save_for_backward(*([torch.cat(slopes)] if slopes else []))
        log_probs, entropies, means, likely = (
            torch.cat(parts) for parts in zip(*told, strict=True)
        )
        ctx.mark_non_differentiable(entropies, means, likely)
        ctx.set_materialize_grads(False)
        return log_probs, entropies, means, likely

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor | None, None, None]:
        """Of the log-probabilities alone."""
        (slope,) = ctx.saved_tensors
        found = None if gradients[0] is None else gradients[0][:, None] * slope
        return None, found, None, None
