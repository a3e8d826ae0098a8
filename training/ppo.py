"""Proximal policy optimisation from a reward (Schulman et al. 2017; Ziegler et al. 2019): config,
data, trainer.

A step samples answers from the policy, scores them at their end tokens, charges β for every nat by
which each token leaves the reference, and improves the policy on the clipped surrogate over a few
passes: `training.ppo_trainer` has the loop and `training.ppo_step` the step. The optimum is
π_ref·exp(score/β), normalised. The details that decide whether it gets there are those of Huang et
al. 2024, "The N implementation details of RLHF with PPO"; where the optimum can be computed, the
tests reach it.

Policy, reference, reward model and critic are one base with adapters (`training.actors`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from training.evaluation import implicit_reward_accuracy
from training.kl_control import AdaptiveKL, FixedKL
from training.loop import Method
from training.prompts import Prompts
from training.rewarded import RewardedConfig, load_data, train
from training.run import TrainingRuntime

__all__ = ["METHOD", "PPOConfig", "train"]


class PPOConfig(RewardedConfig):
    """What to train and how: everything here changes the result.

    A step is a batch of answers with all updates made of it; `epochs` are passes over the prompts.
    """

    method: Literal["ppo"] = "ppo"
    kl: FixedKL | AdaptiveKL = Field(FixedKL(), discriminator="kind")
    """What leaving the reference costs."""
    passes: int = Field(4, ge=1)
    """How often a step's answers are learnt from."""
    clip: float = Field(0.2, gt=0, lt=1)
    """Relative change of a token's probability in a step beyond which nothing is gained."""
    value_clip: float = Field(0.2, gt=0)
    """Change of a value in a step beyond which nothing is gained, in units of the score."""
    value_weight: float = Field(0.1, ge=0)
    """Of the critic's loss beside the policy's: they share the trunk."""
    gamma: float = Field(1.0, ge=0, le=1)
    """What a reward a token later is worth; less than 1 moves the optimum."""
    lam: float = Field(0.95, ge=0, le=1)
    """λ of the advantages: 1 trusts only what was sampled, 0 only the critic."""


def build_trainer(
    config: PPOConfig,
    runtime: TrainingRuntime,
    output: Path,
    prompts: Prompts,
    held_out: Prompts | None,
) -> Any:
    """The loop for this configuration on the freshly loaded model, with its new adapter on."""
    from training.hooks import report_to
    from training.ppo_trainer import PPOTrainer

    config.require_reward()
    trainer = PPOTrainer(config, runtime, output, prompts)
    report_to(trainer, runtime.report_to, output)
    return trainer


METHOD = Method(
    load_data,
    build_trainer,
    implicit_reward_accuracy,
    unit="prompts",
    learnt="answers",
    accuracy=None,
)
