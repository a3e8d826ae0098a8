"""From scores to advantages: pure functions of tensors.

Notation: B answers, T tokens a row. `mask` of shape (B, T) is true at an answer's tokens, its end
token with them; they stand in one run, and what is before and after is padding or prompt. Position
t of any tensor speaks of the t-th token: its log-probability, and the value of the state in which
it was chosen. Padding is 0 in every result.

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_per_token(log_probs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """log π − log π_ref of each sampled token, shape (B, T), in nats.

    Its sum over an answer is an unbiased estimate of KL(π‖π_ref) for that prompt, where the answer
    was sampled from π (k1 of Schulman 2020); single ones are negative half of the time.
    """
    return (log_probs - reference) * mask


def place_rewards(kl: Tensor, scores: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """−β·kl at every token, and the answer's score besides at its last one; shape (B, T).

    `scores` has shape (B,). An answer without any token gets nothing.
    """
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    last = mask & ~following
    return -coefficient * kl * mask + scores[:, None] * last


def end_scores(scores: Tensor, finished: Tensor, missing: float) -> Tensor:
    """The scores, shape (B,), with `missing` in place of those of answers that have no end token.

    In place of, not added to: a reward model reads its score at the end token, and what it says
    of an answer that was cut off means nothing.
    """
    return torch.where(finished, scores, torch.full_like(scores, missing))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and the returns that values are fitted to, both (B, T) (Schulman et al. 2016).

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γ·λ·A_{t+1}, where both V and A are 0 after the last
    token; returns are A + V.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    value_after = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + gamma * value_after - values[:, t]
        following = (surprise + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
        value_after = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of all answers, a scalar; NaN where there is no token."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shifted to mean 0 and scaled to variance 1 over the tokens of all answers."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    # Where all are equal nothing is to be learnt, and the small number makes that 0 instead of NaN.
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(returns − values)/Var(returns), a scalar: 1 is a perfect critic, 0 a constant one.

    Negative for a critic that is worse than a constant; NaN where all returns are equal.
    """
    kept, predicted = returns[mask], values[mask]
    return 1 - (kept - predicted).var(correction=0) / kept.var(correction=0)


def policy_losses(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of each token and whether clipping decided it, both (B, T).

    max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)) with ρ = π/π_old (Schulman et al. 2017, eq. 7).
    """
    # Outside the mask the difference may be anything, and exp of it infinite.
    ratio = ((log_probs - old_log_probs) * mask).exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, clipped) * mask, (clipped > free) & mask


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped squared error of each token and whether clipping decided it, both (B, T).

    ½·max((V − R)², (clip(V, V_old ± ε) − R)²): a value that was moved by more than ε has no
    gradient left to move it further.
    """
    free = (values - returns) ** 2
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    return 0.5 * torch.maximum(free, clipped) * mask, (clipped > free) & mask
