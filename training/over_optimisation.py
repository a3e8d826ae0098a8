"""Stops a policy that pleases its reward and nobody else (Gao, Schulman and Hilton 2023).

The score that is trained on rises as long as anything can be found that it likes. What the policy
is worth shows in the probes, which another judge decides: when it wins less often against the
reference than it did before, while its score went on rising, the probe is bad, and bad probes in a
row end the run with its best weights.

This module imports transformers at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from training.probe import Probe, must_stop
from training.prober import Prober

ONE_SIDED_95 = 1.645
"""Standard errors by which a win rate has to be lower before it counts as fallen."""


class Guard(TrainerCallback):
    """Looks at every probe of the prober that is called before it."""

    def __init__(self, prober: Prober, scores: Mapping[int, float]) -> None:
        """`scores` has the mean score of every step so far, counted from 1."""
        self.prober, self.scores = prober, scores

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark this step's probe as bad if it shows over-optimisation; stop if it was the last
        straw."""
        probes = self.prober.probes
        if not probes or probes[-1].step != state.global_step or probes[-1].breach is not None:
            return
        breach = over_optimised(probes, self.scores)
        if breach is None:
            return
        probes[-1] = dataclasses.replace(probes[-1], breach=breach)
        self.prober.say(f"probe {state.global_step}: {breach}")
        if must_stop(self.prober.config, probes):
            control.should_training_stop = True


def over_optimised(probes: Sequence[Probe], scores: Mapping[int, float]) -> str | None:
    """What is wrong with the last probe against the best one before it, in words, or None.

    Its win rate has to be lower by more than chance (one-sided, 95 %), and the mean score since the
    probe before it higher than it was up to the best probe.
    """
    now = probes[-1]
    rated = [
        (i, p) for i, p in enumerate(probes[:-1]) if p.breach is None and p.win_rate is not None
    ]
    if now.win_rate is None or not rated:
        return None
    place, best = max(rated, key=lambda found: (found[1].win_rate or 0.0, found[0]))
    assert best.win_rate is not None
    error = math.hypot(best.win_rate_error or 0.0, now.win_rate_error or 0.0)
    since = _mean(scores, probes[-2].step, now.step)
    before = _mean(scores, probes[place - 1].step if place else 0, best.step)
    if before is None:
        before = scores.get(1)  # the best is the reference: what its first answers were worth
    fallen = best.win_rate - now.win_rate > ONE_SIDED_95 * error
    if not fallen or since is None or before is None or since <= before:
        return None
    return (
        f"the score rose from {before:.3g} at step {best.step} to {since:.3g} while the win rate "
        f"fell from {best.win_rate:.0%} to {now.win_rate:.0%}: over-optimised"
    )


def _mean(scores: Mapping[int, float], after: int, until: int) -> float | None:
    found = [scores[step] for step in range(after + 1, until + 1) if step in scores]
    return sum(found) / len(found) if found else None
