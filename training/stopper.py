"""Ends a run that no longer gets better on held-out data, and keeps its best weights.

This module imports transformers at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from training import processes
from training.prober import Prober
from training.run import RunFolder
from training.settings import EarlyStopping


class Stopper(TrainerCallback):
    """Looks at one metric of every evaluation, or of every probe."""

    def __init__(
        self,
        config: EarlyStopping,
        name: str,
        run: RunFolder,
        prober: Prober | None,
        save: Callable[[Path], None],
    ) -> None:
        """`name` is what evaluations call the metric; `save` writes the policy's weights into a
        folder."""
        self.config, self.name, self.run, self.prober, self.save = config, name, run, prober, save
        self.by_probes = config.metric == "win_rate"
        # A resumed run has looked before: what it saw is in its journal.
        looks = [line for line in processes.from_main(run.metrics) if "eval_loss" in line]
        self.evaluations = {line["step"]: self._loss(line) for line in looks}
        """By step, what is to become less."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the metric, keep the weights if they are the best so far, and stop if it is time."""
        step = state.global_step
        # The same in all to the last digit, or one would stop and the others wait for it.
        self.evaluations[step] = processes.from_main(lambda: self._loss(kwargs["metrics"]))
        if not self.by_probes:
            if self.best() == step:
                self.save(self.run.best / f"step-{step}")
            self._stop_if_time(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same where it is probes that are looked at; they keep their best weights."""
        if self.by_probes and state.global_step in self._looks():
            self._stop_if_time(control)

    def best(self) -> int | None:
        """The step of the best look so far; one at which a probe was bad does not count."""
        if self.by_probes:
            probe = self.prober.best() if self.prober else None
            return probe.step if probe else None
        probes = self.prober.probes if self.prober else []
        bad = {probe.step for probe in probes if probe.breach is not None}
        looks = {step: loss for step, loss in self._looks().items() if step not in bad}
        return min(looks, key=lambda step: (looks[step], step)) if looks else None

    def step_to_save(self, steps: int, planned: int) -> tuple[int, str | None]:
        """The step whose weights to publish when the run ended after `steps`, and why if not it."""
        best = self.best()
        if best is None or best == steps:
            return steps, None
        kept = "the reference itself" if best == 0 else f"step {best}"
        what = "win rate" if self.by_probes else f"held-out {self.config.metric}"
        ended = f"Stopped after step {steps} of {planned}" if steps < planned else "Ended"
        return best, f"{ended}; the saved weights are those of {kept}, with the best {what}."

    def _looks(self) -> Mapping[int, float]:
        if not self.by_probes:
            return self.evaluations
        probes = self.prober.probes if self.prober else []
        return {p.step: -p.win_rate for p in probes if p.win_rate is not None}

    def _loss(self, metrics: Mapping[str, float]) -> float:
        value = metrics.get(self.name, math.nan)
        value = value if self.config.metric == "loss" else -value
        return value if math.isfinite(value) else math.inf

    def _stop_if_time(self, control: Any) -> None:
        if no_better(self._looks(), self.config.patience):
            # Nothing is to go on from here, so no checkpoint is needed either.
            control.should_training_stop, control.should_save = True, False


def no_better(losses: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` looks, by step, brought nothing lower than those before them."""
    ordered = [losses[step] for step in sorted(losses)]
    return len(ordered) > patience and min(ordered[-patience:]) >= min(ordered[:-patience])
