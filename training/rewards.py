"""The policy's own answers and what they are worth, for every method that learns from them.

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preferences.errors import InputError, ServiceError
from preferences.tables import folder_fingerprint
from training import models
from training.actors import Rewarding, read_reward, reward_adapter
from training.adapters import reference
from training.data import HeldOutPrompt
from training.rewarded import RewardedConfig
from training.rollouts import (
    Answer,
    Rollouts,
    as_rollouts,
    function_scores,
    prompts_of_step,
    sample_answers,
    seed_of_step,
)


def answers_to(
    asked: Sequence[HeldOutPrompt],
    config: RewardedConfig,
    policy: Any,
    tokenizer: Any,
    ends: Collection[int],
    seed: int,
    handed_over: Path,
) -> list[Answer]:
    """An answer to each prompt by the policy as it is now.

    Where a sampler was handed in, the policy is written to the folder `handed_over` for it. Raises
    ServiceError if its answers are not what a sampler promises.
    """
    prompts = [prompt.ids for prompt in asked]
    if config._sampler is None:
        return _sampled(config, policy, tokenizer, ends, prompts, seed)
    models.save_model(policy, tokenizer, config.weights, config.dtype, handed_over)
    answers = config._sampler(
        handed_over,
        prompts,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=seed,
    )
    if len(answers) != len(prompts):
        raise ServiceError(
            f"the sampler returned {len(answers)} answers to {len(prompts)} prompts; each needs one"
        )
    for prompt, answer in zip(asked, answers, strict=True):
        # Without its end token, nothing would teach the policy when to stop.
        if not answer.ids or answer.finished != (answer.ids[-1] in ends):
            raise ServiceError(
                f"the sampler's answer to prompt {prompt.prompt_id} ends with token "
                f"{answer.ids[-1:]} and is said to be "
                f"{'finished' if answer.finished else 'cut'}; an end token belongs to an "
                "answer that is finished, and to no other"
            )
    return list(answers)


def scores_of(
    rollouts: Rollouts, config: RewardedConfig, judged: Rewarding, shift: float, scale: float
) -> tuple[Tensor, dict[str, float]]:
    """Each answer's score, (B,), and the mean of its parts where there are several.

    `shift` is taken off the reward model's raw scores, which are then divided by `scale`.
    """
    device = rollouts.mask.device
    parts = {
        name: torch.tensor(scores, device=device)
        for name, scores in function_scores(config._functions, rollouts).items()
    }
    if config.reward_model is not None:
        parts["reward_model"] = (_raw_scores(rollouts, config, judged) - shift) / scale
    means = {f"score/{name}": float(scores.mean()) for name, scores in parts.items()}
    return torch.stack(list(parts.values())).sum(0), means if len(parts) > 1 else {}


def scale_of_rewards(
    prompts: Sequence[HeldOutPrompt],
    config: RewardedConfig,
    judged: Rewarding,
    policy: Any,
    tokenizer: Any,
    ends: Collection[int],
) -> tuple[float, float]:
    """Mean and deviation of the reward model's raw scores over finished answers of the reference,
    which `policy` is without its adapter."""
    places = prompts_of_step(len(prompts), config.reward_samples, config.seed, 1)
    asked = [prompts[place] for place in places]
    with reference(policy):
        seed = seed_of_step(config.seed, 0)
        answers = _sampled(config, policy, tokenizer, ends, [p.ids for p in asked], seed)
    rollouts = as_rollouts(asked, answers, tokenizer, tokenizer.pad_token_id, policy.device)
    finished = _raw_scores(rollouts, config, judged)[rollouts.finished]
    spread = float(finished.std()) if len(finished) > 1 else 0.0
    if not spread > 0:
        raise InputError(
            f"reward_model: {len(finished)} finished answers of the reference have scores that "
            f"differ by {spread:.3g}; raise max_tokens, or train the reward model longer"
        )
    return float(finished.mean()), spread


def reward_fingerprint(config: RewardedConfig) -> str | None:
    """What the reward model is, wherever it lies; None where there is none."""
    return None if config.reward_model is None else folder_fingerprint(reward_adapter(config))


def require_same_reward(config: RewardedConfig, before: str | None) -> None:
    """Raises InputError if the reward model is not the one of that fingerprint."""
    if before != reward_fingerprint(config):
        raise InputError(
            f"reward_model: {config.reward_model} is not what this run began with; put "
            "that one back, or train in another folder"
        )


def _sampled(
    config: RewardedConfig,
    policy: Any,
    tokenizer: Any,
    ends: Collection[int],
    prompts: Sequence[Sequence[int]],
    seed: int,
) -> list[Answer]:
    return sample_answers(
        policy,
        prompts,
        ends=ends,
        pad=tokenizer.pad_token_id,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        seed=seed,
        batch_size=config.sampling_batch_size,
        bf16=config.dtype == "bfloat16",
    )


def _raw_scores(rollouts: Rollouts, config: RewardedConfig, judged: Rewarding) -> Tensor:
    batches = rollouts.batches(config.batch_size)
    return torch.cat([read_reward(judged, rollouts, rows) for rows in batches])
