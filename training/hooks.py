"""What hangs into TRL's and transformers' training loop: the pre-tokenized trainer and callbacks.

This module imports trl and transformers at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from trl.trainer.dpo_trainer import DPOTrainer

from preferences.errors import InputError, ServiceError
from training.data import HeldOutPrompt
from training.probe import (
    Probe,
    ProbeConfig,
    Scorer,
    WellFormed,
    best_probe,
    malformed_reason,
    measure,
    must_stop,
)
from training.run import RunFolder
from training.sampling import Sample

ProgressFn = Callable[[int, int, Mapping[str, float]], None]
"""Told after every step: the step, how many there are, and the newest metrics."""

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
    "learning_rate": "rate",
}


class PairTrainer(DPOTrainer):
    """DPOTrainer on pairs that are tokens already: TRL 1.16 tokenizes whatever it is given."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL's says nothing of the data and speaks of a model on the Hub."""


class FiniteGradients(TrainerCallback):
    """Stops before a NaN or infinity reaches the weights, so that every checkpoint stays good."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ServiceError if the gradient of this step is not finite."""
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise ServiceError(
                f"step {state.global_step + 1}: the loss or its gradient is not a finite number; "
                "lower learning_rate or raise beta in another folder; the checkpoints here are good"
            )


class Recorder(TrainerCallback):
    """Writes metrics and marks checkpoints complete; shows a bar and one line per log."""

    def __init__(self, run: RunFolder, progress: ProgressFn | None) -> None:
        self.run, self.progress = run, progress
        self.prober: Prober | None = None
        """Its probes are stored with every checkpoint."""
        self.metrics: dict[str, float] = {}
        """The last training metrics."""
        self.evaluation: dict[str, float] = {}
        """The last metrics on held-out pairs."""
        self.console = Console(stderr=True, quiet=progress is not None)
        columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self.bar = Progress(
            TextColumn("training"),
            *columns,
            console=self.console,
            transient=True,
            disable=progress is not None or not self.console.is_terminal,
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
        self.run.complete(state.global_step, tuple(probes), best.step if best else None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Prober(TrainerCallback):
    """Samples the policy on held-out prompts every so often and stops a run that decays."""

    def __init__(
        self,
        config: ProbeConfig,
        run: RunFolder,
        prompts: Sequence[HeldOutPrompt],
        draw: Callable[[], list[Sample]],
        save: Callable[[Path], None],
        scorer: Scorer | None,
        well_formed: WellFormed | None,
        say: Callable[[str], None],
    ) -> None:
        """`draw` samples the policy as it is now; `save` writes its weights into a folder."""
        self.config, self.run, self.prompts = config, run, prompts
        self.draw, self.save = draw, save
        self.scorer, self.well_formed = scorer, well_formed
        self.references: list[Sample] = []
        self.probes: list[Probe] = []
        self.say = say

    def start(self, probes: Sequence[Probe]) -> None:
        """Sample the reference, which the policy still is; `probes` are those of a resumed run.

        Raises InputError if the reference itself breaks a threshold: then none could be kept.
        """
        self.references = self.draw()
        self.probes = list(probes)
        if not self.probes:
            self._probe(0, self.references)
            breach = self.probes[0].breach
            if breach is not None:
                raise InputError(
                    f"the model breaks probe thresholds before any training: {breach}; "
                    "raise probe.max_tokens or the thresholds, or start from a better model"
                )

    def best(self) -> Probe | None:
        """The probe whose weights are in the run's `best` folder."""
        return best_probe(self.probes, scored=self.scorer is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe if it is time, and stop the run if the last probes were all bad."""
        step = state.global_step
        if step % self.config.every and step < state.max_steps:
            return
        self._probe(step, self.draw())
        if must_stop(self.config, self.probes):
            control.should_training_stop = True

    def _probe(self, step: int, samples: Sequence[Sample]) -> None:
        messages = [prompt.messages for prompt in self.prompts]
        pairs = zip(messages, samples, strict=True)
        reasons = [malformed_reason(asked, sample, self.well_formed) for asked, sample in pairs]
        wins = self._judge(step, messages, samples)
        probe = measure(self.config, step, messages, samples, self.references, reasons, wins)
        self.probes.append(probe)
        if self.best() is probe:
            self.save(self.run.best / f"step-{step}")
        self._record(probe, samples, reasons, wins)

    def _judge(
        self, step: int, messages: list[Any], samples: Sequence[Sample]
    ) -> Sequence[float | None]:
        if self.scorer is None:
            return [None] * len(samples)
        if step == 0:
            return [0.5] * len(samples)  # the reference against itself
        responses = [sample.text for sample in samples]
        return self.scorer(messages, responses, [sample.text for sample in self.references])

    def _record(
        self,
        probe: Probe,
        samples: Sequence[Sample],
        reasons: Sequence[str | None],
        wins: Sequence[float | None],
    ) -> None:
        facts = {name: getattr(probe, name) for name in probe.__slots__ if name != "step"}
        self.run.append("metrics.jsonl", {"step": probe.step, "probe": facts})
        for prompt, sample, reason, win in zip(self.prompts, samples, reasons, wins, strict=True):
            line = {"step": probe.step, "prompt_id": prompt.prompt_id, "response": sample.text}
            self.run.append("samples.jsonl", {**line, "malformed": reason, "win": win})
        wins_in_words = "" if probe.win_rate is None else f", wins {probe.win_rate:.0%}"
        if probe.win_rate_error is not None:
            wins_in_words += f" ± {1.96 * probe.win_rate_error:.0%} against the reference"
        self.say(
            f"probe {probe.step}: malformed {probe.malformed:.0%}, cut {probe.length_rate:.0%}, "
            f"{probe.mean_tokens:.0f} tokens (reference {probe.reference_mean_tokens:.0f})"
            f"{wins_in_words}{' — ' + probe.breach if probe.breach else ''}"
        )


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2g} steps/s" if task.speed else "")


def report_to(trainer: Any, service: str, output: Path) -> None:
    """Send metrics to TensorBoard as well, into the run's folder; what prints dictionaries goes."""
    trainer.remove_callback(PrinterCallback)
    if service == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        writer = SummaryWriter(str(output / "tensorboard"))
        trainer.add_callback(TensorBoardCallback(writer))
