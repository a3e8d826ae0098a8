"""How well one trait of the answers, such as their length, tells which of two was chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from preferences.estimate import Z95
from preferences.pair_table import Integers

TELLING = 0.65
"""A trait tells the label if it picks the chosen answer more often than this. People prefer the
longer answer in 62 % of AlpacaEval's pairs."""


@dataclass(frozen=True)
class Share:
    """A share of pairs with its 95 % interval (Wilson 1927)."""

    mean: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether all of the interval is above `TELLING`, or below what is left of 1."""
        return self.low > TELLING or self.high < 1 - TELLING

    def __str__(self) -> str:
        return f"{self.mean:.1%} ({self.low:.1%} to {self.high:.1%})"


def share_of(mean: float, prompts: int) -> Share:
    """A share of pairs that belong to so many prompts.

    Pairs of one prompt are not independent; counting prompts instead is on the safe side.
    """
    centre = (mean + Z95**2 / (2 * prompts)) / (1 + Z95**2 / prompts)
    spread = mean * (1 - mean) / prompts + Z95**2 / (4 * prompts**2)
    half = Z95 * math.sqrt(spread) / (1 + Z95**2 / prompts)
    return Share(mean, max(0.0, centre - half), min(1.0, centre + half))


def area_under_curve(positive: Integers, negative: Integers) -> float:
    """P(a positive is greater than a negative), any of either; a tie counts half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean()) / (2 * len(negative))
