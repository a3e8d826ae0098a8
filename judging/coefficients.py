"""Coefficients of agreement between raters, computed from counts.

A rater's verdict is a class, numbered from 0; where the order of the classes means something
(second, tie, first) the numbers follow it. All that is kept of the verdicts is a square matrix of
counts, so raters of any number of pairs can be compared, and counts can be added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Counts = Sequence[Sequence[float]]
"""Square. Of two raters: how often the one said row and the other column. Of a coincidence matrix:
how often row and column met on the same unit, in both directions."""
NOTHING_SHARED = "nothing judged by two"
ONE_CLASS = "only one verdict occurs"
NOTHING_DECIDED = "no pair without a tie"


@dataclass(frozen=True)
class Coefficient:
    """A coefficient, or what it would take to have one."""

    value: float | None
    missing: str = ""
    """Why there is no value; empty where there is one."""


def add_unit(coincidences: list[list[float]], verdicts: Sequence[int]) -> None:
    """Count one unit's verdicts, one for each rater who gave one.

    Each of the m(m-1) ordered pairs of verdicts weighs 1/(m-1), so a unit adds m to the matrix and
    a unit with one verdict adds nothing (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability").
    """
    if len(verdicts) < 2:
        return
    weight = 1 / (len(verdicts) - 1)
    for number, one in enumerate(verdicts):
        for other in verdicts[number + 1 :]:
            coincidences[one][other] += weight
            coincidences[other][one] += weight


def krippendorff_alpha(
    coincidences: Counts, level: Literal["nominal", "ordinal"] = "nominal"
) -> Coefficient:
    """1 - observed / expected disagreement: 1 is perfect, 0 is chance, below is worse than chance.

    For any number of raters, and where each judged only some of the units. `nominal` holds any two
    classes for equally different; `ordinal` holds a win against a loss for worse than a win against
    a tie (Krippendorff 2011).
    """
    totals = [sum(row) for row in coincidences]
    everything = sum(totals)
    if not everything:
        return Coefficient(None, NOTHING_SHARED)
    observed = expected = 0.0
    for one in range(len(totals)):
        for other in range(one):
            distance = 1.0
            if level == "ordinal":
                between = sum(totals[other : one + 1])
                distance = (between - (totals[one] + totals[other]) / 2) ** 2
            observed += coincidences[one][other] * distance
            expected += totals[one] * totals[other] * distance
    if not expected:
        return Coefficient(None, ONE_CLASS)
    return Coefficient(1 - (everything - 1) * observed / expected)


def cohen_kappa(counts: Counts) -> Coefficient:
    """Agreement of two raters beyond what their own habits give by chance (Cohen 1960, eq. 1).

    1 is perfect, 0 is chance. A rater who always says the same agrees only by chance, so kappa is
    then 0; where both only ever say the same one thing, it has no value.
    """
    total = sum(map(sum, counts))
    if not total:
        return Coefficient(None, NOTHING_SHARED)
    agreed = sum(counts[n][n] for n in range(len(counts))) / total
    rows = [sum(row) / total for row in counts]
    columns = [sum(column) / total for column in zip(*counts, strict=True)]
    chance = sum(row * column for row, column in zip(rows, columns, strict=True))
    if chance == 1:
        return Coefficient(None, ONE_CLASS)
    return Coefficient((agreed - chance) / (1 - chance))


def pairwise_agreement(counts: Counts) -> Coefficient:
    """Share of the pairs on which two raters said the same.

    A tie is a verdict like the others: it agrees with a tie and with nothing else. That is the
    pairwise accuracy of Deutsch, Foster & Freitag 2023 ("Ties Matter", arXiv 2305.14324) and
    setup S1 of Zheng et al. 2023 (MT-Bench, arXiv 2306.05685). Three verdicts at random agree on a
    third of the pairs.
    """
    total = sum(map(sum, counts))
    if not total:
        return Coefficient(None, NOTHING_SHARED)
    return Coefficient(sum(counts[n][n] for n in range(len(counts))) / total)


def decided_agreement(counts: Counts, tie: int) -> Coefficient:
    """The same over the pairs on which neither said `tie`: setup S2 of Zheng et al. 2023.

    Two verdicts at random agree on half of the pairs.
    """
    kept = [n for n in range(len(counts)) if n != tie]
    decided = pairwise_agreement([[counts[row][column] for column in kept] for row in kept])
    if decided.value is None and any(map(any, counts)):
        return Coefficient(None, NOTHING_DECIDED)
    return decided
