"""RLOO (Ahmadian et al. 2024) and GRPO (Shao et al. 2024), top to bottom: configs, model, trainers.

Both answer a prompt several times and learn from by how much an answer is better than the others,
so there is no critic. They differ in where leaving the reference is charged and in what is clipped.

RLOO takes an answer for one action. With R = score − β·[log π(answer) − log π_ref(answer)], summed
over its tokens, its advantage A is R less the mean R of the prompt's other answers, and its loss is
−min(ρ·A, clip(ρ)·A) with ρ = π(answer)/π_sampled(answer). Its optimum is PPO's,
π_ref·exp(score/β), normalised.

GRPO takes every token for one. A is the score less the mean score of all the prompt's answers, over
their deviation if scores are scaled; the loss of a token is −min(ρ·A, clip(ρ)·A) + β·k3, with ρ the
token's own ratio and k3 = π_ref/π − log(π_ref/π) − 1. k3 is differentiated as if the answers were
given, so it pulls along the gradient of KL(π_ref‖π) and the optimum is another one than PPO's, near
the reference too.

Sampling and rewards are those of PPO, the loss is TRL's; `training.group_trainers` joins them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from training import adapters, models
from training.evaluation import implicit_reward_accuracy
from training.loop import Method
from training.prompts import Prompts
from training.rewarded import RewardedConfig, load_data, train
from training.run import TrainingRuntime
from training.settings import training_arguments

__all__ = ["METHOD", "GRPOConfig", "GroupRelativeConfig", "RLOOConfig", "build_trainer", "train"]


class GroupRelativeConfig(RewardedConfig):
    """What RLOO and GRPO share.

    A step is one update, of `batch_size` × `accumulation` answers; `epochs` are passes over the
    prompts.
    """

    beta: float = Field(0.05, ge=0)
    """What leaving the reference costs, in score per nat; 0 asks for no reference."""
    samples: int = Field(8, ge=2)
    """Answers to each prompt, which are compared with each other; `rollouts` is a multiple."""
    passes: int = Field(1, ge=1)
    """How often answers are learnt from."""

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.rollouts % self.samples:
            raise ValueError(
                f"rollouts {self.rollouts} is not a multiple of samples {self.samples}, and all "
                "answers to a prompt are sampled together"
            )
        return self

    @property
    def updates(self) -> int:
        """Updates made of what is sampled at once."""
        return self.rollouts // self.update * self.passes

    @property
    def keeps_start(self) -> bool:
        """As in PPO, but without a price on leaving it and without a reward model nothing asks."""
        return self.beta > 0 or self.reward_model is not None

    def steps(self, prompts: int) -> int:
        """Updates of a run over so many prompts."""
        if self.max_steps is not None:
            return self.max_steps
        asked = (self.epochs or 1.0) * prompts * self.samples
        return math.ceil(asked / self.rollouts) * self.updates


class RLOOConfig(GroupRelativeConfig):
    """What to train and how: everything here changes the result."""

    method: Literal["rloo"] = "rloo"
    clip: float = Field(0.2, gt=0, lt=1)
    """Relative change of an answer's probability, from when it was sampled, beyond which nothing is
    gained."""
    advantage_scale: Literal["none", "batch"] = "none"
    """What advantages are divided by: nothing, or, with their mean taken off, their deviation over
    all that were sampled at once."""


class GRPOConfig(GroupRelativeConfig):
    """What to train and how: everything here changes the result."""

    method: Literal["grpo"] = "grpo"
    beta: float = Field(0.04, ge=0)
    """What leaving the reference costs; 0 asks for no reference."""
    clip: float = Field(0.2, gt=0, lt=1)
    """Relative change of a token's probability, from when it was sampled, beyond which nothing is
    gained."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the deviation of the prompt's scores, that of all scores
    sampled at once, or, as in Dr. GRPO (Liu et al. 2025), nothing, so that prompts whose answers
    are nearly alike do not count as much as others."""
    loss: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """What an update's loss is a mean over: answers, each the mean of its tokens, so that tokens of
    long answers count less (`grpo`); tokens, over `max_tokens` times the answers (`dr_grpo`); or
    tokens, over how many there are (`dapo`, Yu et al. 2025)."""


def build_trainer(
    config: RLOOConfig | GRPOConfig,
    runtime: TrainingRuntime,
    output: Path,
    prompts: Prompts,
    held_out: Prompts | None,
) -> Any:
    """TRL's trainer for this configuration on the freshly loaded model, with its new adapter on."""
    from trl.trainer.utils import disable_dropout_in_model

    from training.group_trainers import GRPO, RLOO
    from training.hooks import report_to

    config.require_reward()
    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    disable_dropout_in_model(model)
    model, adapter = adapters.prepare(model, config, config.gradient_checkpointing)
    kind: Any = RLOO if isinstance(config, RLOOConfig) else GRPO
    arguments = trl_arguments(config, runtime, output, config.steps(len(prompts.prompts)))
    trainer = kind(config, prompts.prompts, output, model, arguments, adapter)
    report_to(trainer, runtime.report_to, output)
    return trainer


def trl_arguments(
    config: RLOOConfig | GRPOConfig, runtime: TrainingRuntime, output: Path, steps: int
) -> Any:
    """The settings as TRL names them; its own defaults would choose what is not said here."""
    from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig
    from trl.trainer.rloo_config import RLOOConfig as TRLRLOOConfig

    shared = training_arguments(config, runtime, output, evaluate=False)
    shared.pop("num_train_epochs", None)
    shared |= {
        "max_steps": steps,
        "adam_epsilon": 1e-5,  # as in PPO: 1e-8 makes full steps out of almost no gradient
        # Where no adapter can be switched off, the trainer is given its reference afterwards.
        "beta": config.beta if models.has_adapter(config.weights) else 0.0,
        "epsilon": config.clip,
        "epsilon_high": None,
        "num_generations": config.samples,
        "generation_batch_size": config.rollouts,
        "num_iterations": config.passes,
        "temperature": config.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "max_completion_length": config.max_tokens,
        "mask_truncated_completions": False,  # they have a score of their own
        "reward_weights": None,
        "remove_unused_columns": False,
        "shuffle_dataset": False,  # the order is ours
        "disable_dropout": False,  # done on the base model
        "sync_ref_model": False,
        "use_vllm": False,
        "log_completions": False,
    }
    if isinstance(config, RLOOConfig):
        batch = config.advantage_scale == "batch"
        return TRLRLOOConfig(**shared, normalize_advantages=batch, reward_clip_range=None)
    return TRLGRPOConfig(
        **shared,
        loss_type=config.loss,
        scale_rewards=config.advantage_scale,
        multi_objective_aggregation="sum_then_normalize",
        importance_sampling_level="token",
        delta=None,
        off_policy_mask_threshold=None,
        use_bias_correction_kl=False,
        top_entropy_quantile=1.0,
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        cast_lm_head_to_fp32=False,
    )


METHOD = Method(
    load_data,
    build_trainer,
    implicit_reward_accuracy,
    unit="prompts",
    learnt="answers",
    accuracy=None,
)
