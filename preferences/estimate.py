"""Means with intervals that know which values belong together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

Z95 = 1.959964
"""Of the normal distribution: 95 % lie within this many standard deviations."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    clusters: int
    """Independent units behind it: prompts, not answers."""

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {(self.high - self.low) / 2:.3f}"


def clustered_mean(values: Iterable[tuple[str, float]]) -> Estimate | None:
    """The mean of (cluster, value) pairs, with a cluster-robust normal interval.

    Answers to one prompt are not independent; taking them for so makes intervals too narrow.
    With clusters of sums d_c around the mean of n values, Var = C/(C-1) Σ d_c² / n² (Liang & Zeger
    1986). None where there is nothing to average; with one cluster the interval is not known and
    is the mean itself.
    """
    sums: dict[str, list[float]] = defaultdict(list)
    for cluster, value in values:
        sums[cluster].append(value)
    count = sum(len(v) for v in sums.values())
    if not count:
        return None
    mean = math.fsum(x for v in sums.values() for x in v) / count
    size = len(sums)
    if size == 1:
        return Estimate(mean, mean, mean, 1)
    spread = math.fsum(math.fsum(x - mean for x in v) ** 2 for v in sums.values())
    error = math.sqrt(size / (size - 1) * spread) / count
    return Estimate(mean, mean - Z95 * error, mean + Z95 * error, size)


def bounded_mean(values: Iterable[tuple[str, float]]) -> Estimate | None:
    """The same of values in [0, 1], with an interval that is no point where all of them agree.

    Two clusters of zeros and two of ones, of average size, are added before the interval is taken
    ("plus four", Agresti & Coull 1998): the variance is then never 0, few clusters say little, and
    many what they say without. The mean is that of the values alone.
    """
    values = list(values)
    found = clustered_mean(values)
    if found is None:
        return None
    size = max(1, round(len(values) / found.clusters))
    extremes = [(f" {n}", float(n % 2)) for n in range(4) for _ in range(size)]
    wider = clustered_mean([*((f"{cluster}.", value) for cluster, value in values), *extremes])
    assert wider is not None
    low, high = max(0.0, min(wider.low, found.mean)), min(1.0, max(wider.high, found.mean))
    return Estimate(found.mean, low, high, found.clusters)
