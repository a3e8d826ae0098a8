"""One step of PPO: from scored answers to better weights.

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from preferences.errors import ServiceError
from training import advantages as pure
from training.actors import Actors, read_policy, read_reference
from training.rollouts import Rollouts

if TYPE_CHECKING:
    from training.ppo import PPOConfig


@dataclass(frozen=True, slots=True)
class Experience:
    """What a step's updates learn from. Tensors are (B, answer length) as `rollouts.mask`."""

    rollouts: Rollouts
    log_probs: Tensor
    """Of the policy that sampled, in nats."""
    values: Tensor
    """Of the critic at that time."""
    advantages: Tensor
    """Whitened."""
    returns: Tensor
    """What the critic is to say."""


def gather_experience(
    config: PPOConfig, actors: Actors, rollouts: Rollouts, scores: Tensor, coefficient: float
) -> tuple[Experience, dict[str, float]]:
    """What policy, critic and reference say of scored answers, and the metrics of that.

    `scores` has shape (B,); `coefficient` is β, in score per nat.
    """
    mask = rollouts.mask
    read: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for rows in rollouts.batches(config.batch_size):
            ours, values = read_policy(actors, rollouts, rows, config.temperature)
            theirs = read_reference(actors, rollouts, rows, config.temperature)
            assert ours.entropy is not None
            read.append((ours.log_probs, values, theirs, ours.entropy))
    log_probs, values, reference, entropy = (torch.cat(part) for part in zip(*read, strict=True))
    kl = pure.kl_per_token(log_probs, reference, mask)
    scores = pure.end_scores(scores, rollouts.finished, config.missing_end_score)
    rewards = pure.place_rewards(kl, scores, mask, coefficient)
    advantages, returns = pure.generalised_advantages(
        rewards, values, mask, config.gamma, config.lam
    )
    metrics = {
        "score": scores.mean(),
        "kl": kl.sum(1).mean(),
        "reward": rewards.sum(1).mean(),
        "entropy": pure.masked_mean(entropy, mask),
        "explained_variance": pure.explained_variance(values, returns, mask),
        "answer_tokens": mask.sum(1).float().mean(),
        "without_end": 1 - rollouts.finished.float().mean(),
    }
    return (
        Experience(rollouts, log_probs, values, pure.whiten(advantages, mask), returns),
        {name: float(value) for name, value in metrics.items()},
    )


def improve(
    config: PPOConfig,
    actors: Actors,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    experience: Experience,
    step: int,
    before_update: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Update policy and critic on a step's experience, `passes` times over; returns the metrics.

    Raises ServiceError before a NaN or an infinity reaches the weights.
    """
    mask, device = experience.rollouts.mask, experience.rollouts.mask.device
    number = len(experience.rollouts)
    # One divisor for all updates of the step: with each update's own number of tokens, a token
    # would count more where it fell among short answers.
    tokens_an_update = mask.sum() * config.update / number
    parameters = list(actors.trained().values())
    totals = dict.fromkeys(("policy_loss", "value_loss", "clip_share", "update_kl"), 0.0)
    for turn in range(config.passes):
        order = torch.arange(number, device=device)[_shuffled(number, config.seed, step, turn)]
        for start in range(0, number, config.update):
            optimizer.zero_grad()
            for first in range(start, start + config.update, config.batch_size):
                rows = order[first : first + config.batch_size]
                found = _losses(config, actors, experience, rows)
                loss = found["policy_loss"] + config.value_weight * found["value_loss"]
                torch.autograd.backward(loss / tokens_an_update)
                for name, value in found.items():
                    totals[name] += float(value.detach())
            before_update()
            _clip_gradients(parameters, config.gradient_clipping, step)
            optimizer.step()
            scheduler.step()
    metrics = {name: total / float(mask.sum() * config.passes) for name, total in totals.items()}
    metrics["loss"] = metrics["policy_loss"] + config.value_weight * metrics["value_loss"]
    return metrics


def take_step(
    config: PPOConfig,
    actors: Actors,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    rollouts: Rollouts,
    scores: Tensor,
    coefficient: float,
    step: int,
    before_update: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Learn from a step's answers and their scores, (B,); returns the metrics."""
    experience, gathered = gather_experience(config, actors, rollouts, scores, coefficient)
    improved = improve(config, actors, optimizer, scheduler, experience, step, before_update)
    return gathered | improved


def _shuffled(number: int, seed: int, step: int, turn: int) -> list[int]:
    order = list(range(number))
    random.Random(f"{seed} {step} {turn}").shuffle(order)
    return order


def _losses(
    config: PPOConfig, actors: Actors, experience: Experience, rows: Tensor
) -> dict[str, Tensor]:
    """Sums over the tokens of some rows; the first two have a gradient."""
    mask, old = experience.rollouts.mask[rows], experience.log_probs[rows]
    ours, values = read_policy(actors, experience.rollouts, rows, config.temperature)
    policy, clipped = pure.policy_losses(
        ours.log_probs, old, experience.advantages[rows], mask, config.clip
    )
    value, _ = pure.value_losses(
        values, experience.values[rows], experience.returns[rows], mask, config.value_clip
    )
    change = (ours.log_probs.detach() - old) * mask
    return {
        "policy_loss": policy.sum(),
        "value_loss": value.sum(),
        "clip_share": clipped.sum(),
        # How far the updates went from the policy that sampled; never negative (Schulman 2020, k3).
        "update_kl": (change.exp() - 1 - change).sum(),
    }


def _clip_gradients(parameters: list[torch.nn.Parameter], most: float | None, step: int) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not math.isfinite(float(norm)):
        raise ServiceError(
            f"step {step}: the loss or its gradient is not a finite number; lower learning_rate in "
            "another folder; the checkpoints here are good"
        )
    if most is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
