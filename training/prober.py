"""Probes the policy from inside the training loop.

This module imports transformers at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from preferences.errors import InputError
from training import processes
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
        """Sample the model, which has to be the reference now; `probes` are a resumed run's.

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
        # The judge is asked once, and whether to stop has one answer.
        probe, reasons, wins = processes.from_main(lambda: self._measured(step, samples))
        self.probes.append(probe)
        if self.best() is probe:
            self.save(self.run.best / f"step-{step}")
        self._record(probe, samples, reasons, wins)

    def _measured(
        self, step: int, samples: Sequence[Sample]
    ) -> tuple[Probe, list[str | None], Sequence[float | None]]:
        messages = [prompt.messages for prompt in self.prompts]
        pairs = zip(messages, samples, strict=True)
        reasons = [malformed_reason(asked, sample, self.well_formed) for asked, sample in pairs]
        wins = self._judge(step, messages, samples)
        probe = measure(self.config, step, messages, samples, self.references, reasons, wins)
        return probe, reasons, wins

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
