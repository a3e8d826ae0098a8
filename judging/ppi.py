"""A mean from a few human labels and many of a judge's: prediction-powered inference, PPI++.

A judge's labels alone are biased, and a few people's alone are uncertain. The judge's mean over all
units, set right by how people differed from it where both judged, is neither (Angelopoulos, Duchi &
Zrnic 2023, "PPI++: Efficient Prediction-Powered Inference", arXiv 2311.01453).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from judging.judge import Group
from preferences.estimate import Z95


@dataclass(frozen=True)
class PoweredEstimate:
    """A mean of what people would say of all units, with its 95 % interval."""

    mean: float
    low: float
    high: float
    standard_error: float
    weight: float
    """How far the judge is believed, from 0 (not at all: the people's mean) to 1."""
    labels: int
    """Units that people judged."""
    predictions: int
    """Units that only the judge judged."""
    effective_labels: float
    """So many human labels alone would give an interval as narrow. At most labels / (1 - φ²), with
    φ the correlation of people and judge: 1.33 times as many where two-way verdicts agree on
    75 %."""


def powered_mean(
    human: Sequence[float], judge: Sequence[float], judge_alone: Sequence[float]
) -> PoweredEstimate | None:
    """The mean of the human labels over all units.

    `human` and `judge` are of the same units, which must be a random sample of all of them;
    `judge_alone` is of the rest. A unit is what is drawn independently: a prompt, not an answer.
    None with fewer than two human labels: their spread is not known.

    With n labels Y and predictions f on them, and N predictions f' on the rest, the mean is
    λ·mean(f') + mean(Y - λf) and its variance λ²·Var(f')/N + Var(Y - λf)/n. The variance is least
    at λ = Cov(Y, f) / ((1 + n/N)·Var(f)), the paper's power tuning, held between 0 and 1 so that a
    judge who contradicts people is left out.
    """
    y, f, rest = (np.asarray(values, dtype=np.float64) for values in (human, judge, judge_alone))
    if len(y) != len(f):
        raise ValueError(f"{len(y)} human labels and {len(f)} of the judge on the same units")
    if len(y) < 2:
        return None
    weight = _weight(y, f, rest)
    corrected = y - weight * f
    mean = float(corrected.mean())
    variance = float(corrected.var(ddof=1)) / len(y)
    if weight:
        mean += weight * float(rest.mean())
        variance += weight**2 * float(rest.var(ddof=1)) / len(rest)
    error = math.sqrt(variance)
    spread = float(y.var(ddof=1))
    return PoweredEstimate(
        mean=mean,
        low=mean - Z95 * error,
        high=mean + Z95 * error,
        standard_error=error,
        weight=weight,
        labels=len(y),
        predictions=len(rest),
        # Labels that are all alike have no spread, and nothing to gain.
        effective_labels=spread / variance if spread and variance else float(len(y)),
    )


def powered_win_rate(
    groups: Sequence[Group],
    human: Sequence[float | None],
    judge: Sequence[float | None],
) -> PoweredEstimate | None:
    """The win rate that people would see, from `win_probabilities` of people and of a judge.

    Each prompt counts once, by the mean over its groups that have the labels. People's prompts must
    be a random sample of all; what the judge did not judge is left out.
    """
    both: dict[str, list[tuple[float, float]]] = defaultdict(list)
    alone: dict[str, list[float]] = defaultdict(list)
    for group, ours, its in zip(groups, human, judge, strict=True):
        if its is not None:
            prompt_id = group.prompt.prompt_id
            if ours is not None:
                both[prompt_id].append((ours, its))
            else:
                alone[prompt_id].append(its)
    labels = [np.mean(pairs, axis=0).tolist() for pairs in both.values()]
    rest = [float(np.mean(given)) for prompt_id, given in alone.items() if prompt_id not in both]
    return powered_mean([ours for ours, _ in labels], [its for _, its in labels], rest)


def _weight(y: np.ndarray, f: np.ndarray, rest: np.ndarray) -> float:
    """λ, from 0 to 1."""
    spread = float(np.concatenate([f, rest]).var(ddof=1))
    if len(rest) < 2 or not spread:
        return 0.0
    covariance = float(np.cov(y, f)[0, 1])
    return min(max(covariance / ((1 + len(y) / len(rest)) * spread), 0.0), 1.0)
