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

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from preferences.errors import InputError
from training import loop
from training.evaluation import implicit_reward_accuracy
from training.kl_control import AdaptiveKL, FixedKL
from training.loop import Method
from training.probe import ProbeConfig, Scorer, WellFormed
from training.prompts import Prompts, load_prompts
from training.rollouts import RewardFunction, Sampler
from training.run import TrainingResult, TrainingRuntime
from training.settings import TrainingConfig

if TYPE_CHECKING:
    from training.hooks import ProgressFn

__all__ = ["METHOD", "PPOConfig", "train"]


class PPOConfig(TrainingConfig):
    """What to train and how: everything here changes the result.

    A step is a batch of answers with all updates made of it; `epochs` are passes over the prompts.
    """

    method: Literal["ppo"] = "ppo"
    reward_model: str | None = None
    """The folder of a reward model's run on the same base, with an adapter. Its scores are brought
    to mean 0 and deviation 1 over the reference's answers."""
    reward_functions: dict[str, str] = Field(default_factory=dict)
    """Functions of yours by name, each as `package.module:function` or `file.py:function`: called
    with a prompt and an answer, they return a score, higher is better. Scores of all of them and of
    the reward model are added up."""
    kl: FixedKL | AdaptiveKL = Field(FixedKL(), discriminator="kind")
    """What leaving the reference costs."""
    temperature: float = Field(0.7, gt=0)
    """What answers are sampled at; the policy that is trained is the one at this temperature."""
    max_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens with its end."""
    missing_end_score: float = -1.0
    """The score of an answer that was cut there, in place of its own."""
    rollouts: int = Field(64, ge=1)
    """Answers sampled in a step, a multiple of `batch_size` × `accumulation`."""
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
    reward_samples: int = Field(256, ge=2)
    """Answers of the reference over which the reward model's scores are normalised."""
    learning_rate: float = Field(3e-6, gt=0)
    """Peak of the schedule: about 3e-6 for full weights, ten times that for adapters."""
    warmup_share: float = Field(0.0, ge=0, lt=1)
    """Share of the updates in which the learning rate rises from 0 to its peak."""
    probe: ProbeConfig | None = ProbeConfig(temperature=0.7)
    """Held-out sampling while training, best at the same temperature; null trains blind, without
    anything that would notice over-optimisation."""

    _functions: Mapping[str, RewardFunction] = PrivateAttr(default_factory=dict)
    _sampler: Sampler | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rollouts % self.update:
            raise ValueError(
                f"rollouts {self.rollouts} is not a multiple of batch_size × accumulation "
                f"{self.update}"
            )
        if self.lora.dropout:
            # The policy that is updated has to be the one that was sampled.
            raise ValueError("lora.dropout: PPO trains without dropout; say 0")
        if self.early_stopping is not None and self.early_stopping.metric != "win_rate":
            raise ValueError(
                "early_stopping.metric: PPO has no held-out loss or accuracy; say win_rate"
            )
        return self

    def given(
        self, functions: Mapping[str, RewardFunction], sampler: Sampler | None = None
    ) -> PPOConfig:
        """The same with what it names and training cannot load: the functions of
        `reward_functions`, and what samples in place of transformers."""
        copy = self.model_copy()
        copy._functions, copy._sampler = dict(functions), sampler
        return copy


def train(
    config: PPOConfig,
    dataset: Path,
    output: Path,
    runtime: TrainingRuntime | None = None,
    scorer: Scorer | None = None,
    well_formed: WellFormed | None = None,
    progress: ProgressFn | None = None,
    functions: Mapping[str, RewardFunction] | None = None,
    sampler: Sampler | None = None,
) -> TrainingResult:
    """`training.loop.train` with the functions that `reward_functions` names and, if answers are
    not to be sampled by transformers, with what samples them.

    `scorer` also guards against over-optimisation: a run whose score rises while the win rate
    against the reference falls is stopped, and its best probe's weights are kept.
    """
    given = config.given(functions or {}, sampler)
    return loop.train(given, dataset, output, runtime, scorer, well_formed, progress)


def load_data(
    config: PPOConfig, dataset: Path, tokenizer: Any
) -> tuple[Prompts | None, Prompts | None]:
    """Prompts to answer and held-out ones."""
    train_prompts, held_out = (
        load_prompts(
            dataset, split, tokenizer, max_length=config.max_length, max_tokens=config.max_tokens
        )
        for split in ("train", "test")
    )
    return train_prompts, held_out


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

    odd = sorted(set(config.reward_functions) ^ set(config._functions))
    if odd:
        raise InputError(
            f"reward_functions: {odd[0]} has to be named there and handed in as a function; train "
            "by a recipe, or give it to training.ppo.train"
        )
    if config.reward_model is None and not config._functions:
        raise InputError("nothing rewards the answers; give reward_model or reward_functions")
    trainer = PPOTrainer(config, runtime, output, prompts)
    report_to(trainer, runtime.report_to, output)
    return trainer


METHOD = Method(load_data, build_trainer, implicit_reward_accuracy, unit="prompts", accuracy=None)
