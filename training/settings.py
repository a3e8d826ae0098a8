"""The settings that every training method shares, and the same for transformers' trainer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from preferences.config import Config
from preferences.errors import InputError, MissingExtra
from training import processes
from training.adapters import WeightsConfig
from training.models import Dtype
from training.probe import ProbeConfig
from training.run import TrainingRuntime

Schedule = Literal["linear", "cosine", "constant"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"]

# Our names and transformers'.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
}


class EarlyStopping(Config):
    """When to end a run that no longer gets better on what is held out."""

    metric: Literal["loss", "accuracy", "win_rate"] = "loss"
    """What is looked at: the held-out loss or accuracy, every `eval_steps`, or the win rate of the
    probes against the reference."""
    patience: int = Field(3, ge=1)
    """So many looks in a row without a better value end the run."""


class TrainingConfig(WeightsConfig):
    """What to train and how: everything here changes the result."""

    method: str
    """How: each method narrows this to its name."""
    model: str
    """A folder with weights or a Hub id; what training starts from, and its reference."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    learning_rate: float = Field(5e-6, gt=0)
    """Peak of the schedule: about 5e-7 to 5e-6 for full weights, ten times that for adapters."""
    schedule: Schedule = "linear"
    """How the learning rate goes from its peak: to 0 in a line or half a cosine, or not at all."""
    warmup_share: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0 to its peak."""
    optimizer: Optimizer = "adamw"
    """What makes steps of gradients: AdamW (8 bytes a trained parameter), the same with its state
    in 8 bits (2 bytes), that besides in memory which moves to the host when the GPU's is full, or
    Adafactor (about none)."""
    weight_decay: float = Field(0.0, ge=0)
    """Share of a weight that is taken off in each step, times the learning rate; biases and norms
    are left alone."""
    gradient_clipping: float | None = Field(1.0, gt=0)
    """Largest norm of a step's gradient; a longer one is made so long. Null clips nothing."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data; 1 where neither this nor `max_steps` is given."""
    max_steps: int | None = Field(None, ge=1)
    """Updates of the weights, in place of `epochs`."""
    batch_size: int = Field(8, ge=1)
    """Examples in memory at once; for methods on pairs, pairs."""
    accumulation: int = Field(1, ge=1)
    """Batches gathered for one update, whose loss is the mean over all their examples."""
    batch_tokens: int | None = Field(None, ge=1)
    """Most tokens in memory at once, in place of a number of examples: an update is then made of
    `batch_size` of them, which are computed in as many batches as it takes. It changes memory and
    time and not what is learnt."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of prompt and answer together; what is longer is dropped and counted, not cut."""
    dtype: Dtype = "bfloat16"
    """The numbers the model computes with."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory, about 20 % slower."""
    seed: int = Field(0, ge=0)
    """Of the adapter's start, the order of the data, dropout, and the probes' samples."""
    eval_steps: int = Field(100, ge=1)
    """Steps between two evaluations on the held-out data; the last step is always evaluated."""
    early_stopping: EarlyStopping | None = None
    """Ends a run that no longer gets better and keeps its best weights; without it, a run goes to
    its end and keeps its last."""
    probe: ProbeConfig | None = ProbeConfig()
    """Held-out sampling while training; null trains blind: metrics do not show a collapse."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both given; give one")
        if self.batch_tokens is not None and self.accumulation > 1:
            raise ValueError(
                "batch_tokens finds how many batches an update takes, and accumulation says it; "
                f"leave accumulation out and say batch_size: {self.update}"
            )
        if self.early_stopping and self.early_stopping.metric == "win_rate" and not self.probe:
            raise ValueError(
                "early_stopping.metric: win_rate comes from probes, and probe is null; give a "
                "probe, or look at loss"
            )
        return self

    @property
    def update(self) -> int:
        """Examples that one update of the weights is made of."""
        return self.batch_size * self.accumulation

    @property
    def eval_batch_size(self) -> int:
        """Examples at once where there is no gradient: on held-out data and for the reference."""
        if self.batch_tokens is None:
            return self.batch_size
        # Two answers of a pair at their longest. KTO's loss needs two examples.
        return min(self.batch_size, max(2, self.batch_tokens // (2 * self.max_length)))


def require_optimizer(config: TrainingConfig) -> None:
    """Raises MissingExtra or InputError if the optimizer cannot run here."""
    import torch

    name = config.optimizer
    if not name.endswith("8bit"):
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(f"optimizer: {name} needs bitsandbytes: pip install pairwright[train]")
    if name.startswith("paged") and not torch.cuda.is_available():
        raise InputError(f"optimizer: {name} needs a GPU; say adamw_8bit or adamw")


def training_arguments(
    config: TrainingConfig, runtime: TrainingRuntime, output: Path, evaluate: bool
) -> dict[str, Any]:
    """For transformers' TrainingArguments and TRL's classes of them, as keywords.

    What is left out there would be filled by defaults that differ from class to class.
    """
    import torch

    length = (
        {"max_steps": config.max_steps}
        if config.max_steps is not None
        else {"num_train_epochs": config.epochs or 1.0}
    )
    return {
        "output_dir": str(output),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": SCHEDULES[config.schedule],
        "warmup_steps": config.warmup_share,
        "optim": OPTIMIZERS[config.optimizer],
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.gradient_clipping or 0.0,
        "per_device_train_batch_size": config.batch_size // processes.count(),
        "per_device_eval_batch_size": max(config.eval_batch_size // processes.count(), 1),
        "gradient_accumulation_steps": config.accumulation,
        "gradient_checkpointing": config.gradient_checkpointing,
        "seed": config.seed,
        "bf16": config.dtype == "bfloat16",  # TRL's default is True, on CPU too
        "fp16": config.dtype == "float16",
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": config.eval_steps,
        "logging_steps": runtime.log_steps,
        "logging_nan_inf_filter": False,  # True writes the running mean in place of a NaN
        "save_strategy": "steps",
        "save_steps": runtime.save_steps,
        "report_to": ["wandb"] if runtime.report_to == "wandb" else [],
        "run_name": output.name,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),  # or bfloat16 is refused there
        "dataloader_pin_memory": torch.cuda.is_available(),
        **processes.arguments(runtime),
        **length,
    }
