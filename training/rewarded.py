"""What the methods share that learn from rewards of the policy's own answers: settings, data, and
what rewards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from preferences.errors import InputError
from training import loop
from training.probe import ProbeConfig, Scorer, WellFormed
from training.prompts import Prompts, load_prompts
from training.rollouts import RewardFunction, Sampler
from training.run import TrainingResult, TrainingRuntime
from training.settings import TrainingConfig

if TYPE_CHECKING:
    from training.hooks import ProgressFn


class RewardedConfig(TrainingConfig):
    """What to train and how, where answers are sampled from the policy and rewarded."""

    reward_model: str | None = None
    """The folder of a reward model's run on the same base, with an adapter. Its scores are brought
    to mean 0 and deviation 1 over the reference's answers."""
    reward_functions: dict[str, str] = Field(default_factory=dict)
    """Functions of yours by name, each as `package.module:function` or `file.py:function`: called
    with a prompt and an answer, they return a score, higher is better. Scores of all of them and of
    the reward model are added up."""
    temperature: float = Field(0.7, gt=0)
    """What answers are sampled at; the policy that is trained is the one at this temperature."""
    max_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens with its end."""
    sampling_batch_size: int = Field(32, ge=1)
    """Answers that transformers samples at once, whose keys and values are held meanwhile; it
    decides which of them share a seed. More of them are faster."""
    missing_end_score: float = -1.0
    """The score of an answer that was cut there, in place of its own."""
    sampler: Literal["transformers", "vllm"] = "transformers"
    """Who samples them: `transformers`, with the weights that train; or `vllm`, in a process of its
    own that is handed the adapter before every sampling, much faster where answers are long."""
    rollouts: int = Field(64, ge=1)
    """Answers that a step learns from, a multiple of `batch_size` × `accumulation`."""
    reward_samples: int = Field(256, ge=2)
    """Answers of the reference over which the reward model's scores are normalised."""
    learning_rate: float = Field(3e-6, gt=0)
    """Peak of the schedule: about 3e-6 for full weights, ten times that for adapters."""
    warmup_share: float = Field(0.0, ge=0, lt=1)
    """Share of the updates in which the learning rate rises from 0 to its peak."""
    batch_tokens: None = None
    """`batch_size` says it: how long answers will be is not known before."""
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
        if self.sampler == "vllm" and self.weights not in ("lora", "qlora"):
            raise ValueError(
                f"sampler: vLLM puts LoRA adapters on, and weights are {self.weights}; say "
                "transformers, or weights: lora"
            )
        name = self.method.upper()
        if self.lora.dropout:
            # The policy that is updated has to be the one that was sampled.
            raise ValueError(f"lora.dropout: {name} trains without dropout; say 0")
        if self.early_stopping is not None and self.early_stopping.metric != "win_rate":
            raise ValueError(
                f"early_stopping.metric: {name} has no held-out loss or accuracy; say win_rate"
            )
        return self

    @property
    def keeps_start(self) -> bool:
        """Whether the model it starts from is needed all along, as reference or under a reward
        model: where full weights train, as a copy."""
        return True

    def given(
        self, functions: Mapping[str, RewardFunction], sampler: Sampler | None = None
    ) -> Self:
        """The same with what it names and training cannot load: the functions of
        `reward_functions`, and what samples in place of transformers."""
        copy = self.model_copy()
        copy._functions, copy._sampler = dict(functions), sampler
        return copy

    def require_reward(self) -> None:
        """Raises InputError if nothing rewards, or a named function was not handed in."""
        odd = sorted(set(self.reward_functions) ^ set(self._functions))
        if odd:
            raise InputError(
                f"reward_functions: {odd[0]} has to be named there and handed in as a function; "
                "train by a recipe, or give it to training.rewarded.train"
            )
        if self.reward_model is None and not self._functions:
            raise InputError("nothing rewards the answers; give reward_model or reward_functions")


def train(
    config: RewardedConfig,
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
    config: RewardedConfig, dataset: Path, tokenizer: Any
) -> tuple[Prompts | None, Prompts | None]:
    """Prompts to answer and held-out ones."""
    train_prompts, held_out = (
        load_prompts(
            dataset, split, tokenizer, max_length=config.max_length, max_tokens=config.max_tokens
        )
        for split in ("train", "test")
    )
    return train_prompts, held_out
