"""What hangs into the training loop of transformers and TRL, whatever the method: callbacks, and
what TRL's trainers must not do.

This module imports transformers at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import PrinterCallback, TrainerCallback

from preferences.errors import ServiceError
from training import models, processes
from training.probe import Scorer, WellFormed
from training.prober import Prober
from training.run import Checkpoint, RunFolder
from training.sampling import sample
from training.settings import TrainingConfig
from training.stopper import Stopper

if TYPE_CHECKING:
    from training.loop import Method, Split

ProgressFn = Callable[[int, int, Mapping[str, float]], None]
"""Told after every step: the step, how many there are, and the newest metrics."""

SMALLEST_SCALE = 1.0
"""Of float16's loss. It begins at 65,536 and is halved whenever a gradient is not finite."""

# They differ between an interrupted run and an uninterrupted one and say nothing of the model.
VOLATILE = ("_runtime", "_per_second", "num_tokens", "total_flos", "train_loss")

IN_WORDS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "log p(chosen)",
    "logps/rejected": "log p(rejected)",
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "held-out accuracy",
    "eval_rewards/margins": "held-out margin",
    "nll_loss": "log loss",
    "log_odds_ratio": "log odds ratio",
    "score": "score",
    "kl": "KL",
    "without_end": "without end",
    "eval_new_loss": "loss on new texts",
    "eval_old_loss": "loss on old texts",
    "learning_rate": "rate",
}


class Tokenized:
    """Goes before a trainer of TRL's: its data is tokens already, and TRL 1.16 would tokenize
    whatever it is given."""

    forward_pass: str | None
    """Which one runs and why; None where there is but one, or it is not known yet."""

    def __init__(self, *args: Any, **values: Any) -> None:
        if values["args"].fsdp:
            # The head's weights are read past the module that FSDP puts together; TRL's own forward
            # pass puts them together itself.
            self.forward_pass = "TRL's, with padding and repeated prompts: the model is divided"
        super().__init__(*args, **values)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *given: Any) -> Any:
        trl: Any = super()
        if processes.count() == 1:
            return trl._precompute_ref_logps(dataset, *given)
        # One process writes them beside the dataset's file, and all read them there.
        folder = processes.from_main(lambda: tempfile.mkdtemp(prefix="pairwright-"))
        if processes.is_main():
            dataset.save_to_disk(folder)
        processes.wait()
        found = trl._precompute_ref_logps(datasets.load_from_disk(folder), *given)
        processes.wait()
        if processes.is_main():
            shutil.rmtree(folder)  # what is mapped into memory stays
        return found

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL's says nothing of the data and speaks of a model on the Hub."""


class FiniteGradients(TrainerCallback):
    """Stops before a NaN or infinity reaches the weights, so that every checkpoint stays good."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ServiceError if the gradient of this step is not finite, or with float16, in which
        a step of too large a scale is skipped, if the scale is no reason any more."""
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        if scaler is not None and scaler.get_scale() >= SMALLEST_SCALE:
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not torch.isfinite(processes.whole(torch.nn.utils.get_total_norm(gradients))):
            raise ServiceError(
                f"step {state.global_step + 1}: the loss or its gradient is not a finite number; "
                "lower learning_rate in another folder; the checkpoints here are good"
            )


class Recorder(TrainerCallback):
    """Writes metrics and marks checkpoints complete; shows a bar and one line per log."""

    def __init__(self, run: RunFolder, progress: ProgressFn | None) -> None:
        self.run = run
        self.prober: Prober | None = None
        """Its probes are stored with every checkpoint."""
        self.stopper: Stopper | None = None
        """Its best weights are kept with every checkpoint."""
        self.metrics: dict[str, float] = {}
        """The last training metrics."""
        self.evaluation: dict[str, float] = {}
        """The last metrics on held-out pairs."""
        self.progress = progress if processes.is_main() else None
        quiet = progress is not None or not processes.is_main()
        self.console = Console(stderr=True, quiet=quiet)
        columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self.bar = Progress(
            TextColumn("training"),
            *columns,
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar where the run stands."""
        # A resumed state carries the intervals of the process that was interrupted.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        self.bar.start()
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is logged, and not saved as a checkpoint: the run's weights come next."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            control.should_log, control.should_save = True, False
        self.bar.update(self.task, completed=state.global_step)
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, self.metrics)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One line into `metrics.jsonl` and one on the console."""
        logs: dict[str, float] = kwargs["logs"]
        if "train_runtime" in logs:
            return  # the library's summary at the end
        metrics = {
            name: value
            for name, value in logs.items()
            if not name.endswith(VOLATILE) and math.isfinite(value)
        }
        if any(name.startswith("eval_") for name in logs):
            self.evaluation = metrics
        else:
            self.metrics = metrics
        self.run.append("metrics.jsonl", {"step": state.global_step, **metrics})
        words = [f"{IN_WORDS[key]} {metrics[key]:.4g}" for key in IN_WORDS if key in metrics]
        self.say(f"step {state.global_step}/{state.max_steps}: " + ", ".join(words))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is written: mark it, with the probes so far."""
        probes = self.prober.probes if self.prober else []
        best = self.prober.best() if self.prober else None
        kept = [best.step if best else None, self.stopper.best() if self.stopper else None]
        processes.wait()  # each writes its own random state
        self.run.complete(state.global_step, tuple(probes), {s for s in kept if s is not None})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2g} steps/s" if task.speed else "")


@dataclass(frozen=True, slots=True)
class Watch:
    """What accompanies a run."""

    recorder: Recorder
    prober: Prober | None
    stopper: Stopper | None


def watch(
    trainer: Any,
    config: TrainingConfig,
    method: Method,
    run: RunFolder,
    held_out: Split | None,
    scorer: Scorer | None,
    well_formed: WellFormed | None,
    progress: ProgressFn | None,
) -> Watch:
    """Hang what probes, stops, records and guards the run into the trainer.

    In this order, so that a checkpoint holds the probe of its own step, and no run is saved as
    unfinished that has just been stopped.
    """
    tokenizer = trainer.processing_class
    recorder = Recorder(run, progress)
    save = functools.partial(
        models.save_model, trainer.model, tokenizer, config.weights, config.dtype
    )
    if config.probe is not None and held_out is not None:
        prompts = held_out.prompts[: config.probe.prompts]
        draw = functools.partial(
            sample,
            trainer.model,
            tokenizer,
            [prompt.ids for prompt in prompts],
            ends=models.end_tokens(config.model, config.revision, tokenizer),
            max_tokens=config.probe.max_tokens,
            temperature=config.probe.temperature,
            seed=config.seed,
            batch_size=config.probe.batch_size,
            bf16=config.dtype == "bfloat16",
        )
        recorder.prober = Prober(
            config.probe, run, prompts, draw, save, scorer, well_formed, recorder.say
        )
        trainer.add_callback(recorder.prober)
    if config.early_stopping is not None:
        name = (config.early_stopping.metric == "accuracy" and method.accuracy) or "eval_loss"
        recorder.stopper = Stopper(config.early_stopping, name, run, recorder.prober, save)
        trainer.add_callback(recorder.stopper)
    trainer.add_callback(recorder)
    trainer.add_callback(FiniteGradients())
    return Watch(recorder, recorder.prober, recorder.stopper)


def run_trainer(
    trainer: Any,
    config: TrainingConfig,
    unit: str,
    checkpoint: Checkpoint | None,
    recorder: Recorder,
) -> None:
    """Train to the end, from the checkpoint if there is one; ServiceError if memory runs out."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
    except torch.OutOfMemoryError:
        held = f"{config.batch_size} {unit} of up to {config.max_length} tokens"
        cure = "halve batch_size and double accumulation"
        if config.batch_tokens is not None:
            held, cure = f"{config.batch_tokens} tokens", "halve batch_tokens"
        raise ServiceError(
            f"out of memory with {held}; in another folder, {cure}, which trains the same"
        ) from None
    finally:
        recorder.bar.stop()


def report_to(trainer: Any, service: str, output: Path) -> None:
    """Send metrics to TensorBoard as well, into the run's folder; what prints dictionaries goes."""
    trainer.remove_callback(PrinterCallback)
    if service == "tensorboard" and processes.is_main():
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        writer = SummaryWriter(str(output / "tensorboard"))
        trainer.add_callback(TensorBoardCallback(writer))  # type: ignore[no-untyped-call]
