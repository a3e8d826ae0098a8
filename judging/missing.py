"""What a judge did not say: how much is missing, and whether it is missing at random.

A few unreadable replies do little harm. Many do, the more so where they are of another kind than
the rest, as of long answers: what is left is then a biased sample.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preferences.records import Candidate, Judgment, Prompt

ALARM = 0.02
"""The largest share of missing judgments that is let pass."""
SIGNIFICANT = 0.01
"""The p-value below which what is missing is said to differ from what was read."""
SHUFFLES = 2000


@dataclass(frozen=True)
class Lengths:
    """Characters of the answers shown, all of a judgment's together."""

    read: float
    """Median over the judgments that were read."""
    missing: float
    """Median over those that were not."""
    p_value: float
    """By the test of Mann and Whitney."""


@dataclass(frozen=True)
class Shares:
    """The share that is missing, from 0 to 1, of each kind of judgment."""

    missing: dict[str, float]
    p_value: float
    """Of shares at least this unequal if judgments were missing at random."""


@dataclass(frozen=True)
class Missing:
    """What is missing of one judge's judgments.

    The tests take judgments for independent. Those of one prompt are not quite, so that p-values
    are somewhat too small: they point to where to look and prove nothing.
    """

    judge: str
    judgments: int
    missing: int
    reasons: dict[str, int]
    """How many for each reason, the most frequent first. Numbers in a reason are left out, so
    that alike ones are counted together."""
    lengths: Lengths | None
    """None where all are missing or none is."""
    categories: Shares | None
    """By the prompts' category. None where there are not two, or where nothing is missing."""
    statuses: Shares | None
    """`truncated` where an answer shown was cut off, else `complete`."""

    @property
    def share(self) -> float:
        """Missing of all, from 0 to 1."""
        return self.missing / self.judgments if self.judgments else 0.0

    @property
    def is_alarming(self) -> bool:
        """Whether more is missing than is let pass."""
        return self.share > ALARM

    def sentence(self) -> str | None:
        """The alarm for people, or None where there is none."""
        if not self.is_alarming:
            return None
        reason, count = next(iter(self.reasons.items()))
        parts = [
            f"{self.judge}: {self.missing:,} of {self.judgments:,} judgments are missing "
            f"({self.share:.1%}, alarm above {ALARM:.0%}), {count:,} of them because: {reason}"
        ]
        if self.lengths is not None and self.lengths.p_value < SIGNIFICANT:
            longer = "longer" if self.lengths.missing > self.lengths.read else "shorter"
            parts.append(
                f"they are of {longer} answers (median {self.lengths.missing:,.0f} characters "
                f"against {self.lengths.read:,.0f})"
            )
        for what, shares in (("category", self.categories), ("status", self.statuses)):
            if shares is not None and shares.p_value < SIGNIFICANT:
                worst = max(shares.missing, key=shares.missing.__getitem__)
                parts.append(f"{shares.missing[worst]:.1%} of {what} {worst} are missing")
        return "; ".join(parts)


def missing_judgments(
    judgments: Iterable[Judgment],
    candidates: Mapping[str, Candidate],
    prompts: Mapping[str, Prompt],
) -> list[Missing]:
    """What is missing, judge by judge, by name. Candidates and prompts are by their ids."""
    by_judge: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        by_judge[judgment.judge].append(judgment)
    return [_of_one(by_judge[judge], candidates, prompts) for judge in sorted(by_judge)]


def mann_whitney(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p-value of two samples' being from one distribution.

    By the normal approximation with corrections for ties and continuity (Mann & Whitney 1947);
    good from about 8 values on each side.
    """
    n, m = len(one), len(other)
    _, inverse, counts = np.unique([*one, *other], return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    excess = abs(ranks[:n].sum() - n * (n + 1) / 2 - n * m / 2) - 0.5
    total = n + m
    ties = float((counts.astype(float) ** 3 - counts).sum()) / (total * (total - 1))
    variance = n * m / 12 * (total + 1 - ties)
    if variance <= 0:
        return 1.0
    return min(1.0, math.erfc(excess / math.sqrt(2 * variance)))


def unequal_shares(missing: Sequence[int], of: Sequence[int]) -> float:
    """P-value of the missing's being spread over kinds at random, by shuffling (χ² statistic)."""
    counts = np.array(of)
    observed = np.array([missing])
    share = observed.sum() / counts.sum()
    shuffled = np.random.default_rng(0).multivariate_hypergeometric(
        counts, int(observed.sum()), size=SHUFFLES
    )

    def distance(drawn: np.ndarray) -> np.ndarray:
        found: np.ndarray = ((drawn - counts * share) ** 2 / counts).sum(axis=1)
        return found

    # A hair less, so that a draw that equals what was observed counts whatever the rounding.
    at_least = distance(shuffled) >= distance(observed) * (1 - 1e-9)
    return float((at_least.sum() + 1) / (SHUFFLES + 1))


def _of_one(
    judgments: Sequence[Judgment],
    candidates: Mapping[str, Candidate],
    prompts: Mapping[str, Prompt],
) -> Missing:
    failed = [j for j in judgments if j.failure is not None]
    reasons = Counter(re.sub(r"\d+(?:\.\d+)?", "…", j.failure or "") for j in failed)
    return Missing(
        judge=judgments[0].judge,
        judgments=len(judgments),
        missing=len(failed),
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        lengths=_lengths(judgments, candidates),
        categories=_shares(
            [(prompts[j.prompt_id].category or "none", j.failure is not None) for j in judgments]
        ),
        statuses=_shares([(_status(j, candidates), j.failure is not None) for j in judgments]),
    )


def _lengths(judgments: Sequence[Judgment], candidates: Mapping[str, Candidate]) -> Lengths | None:
    lengths: dict[bool, list[float]] = {False: [], True: []}
    for judgment in judgments:
        shown = sum(len(candidates[c].response) for c in judgment.candidate_ids)
        lengths[judgment.failure is not None].append(float(shown))
    read, missing = lengths[False], lengths[True]
    if not read or not missing:
        return None
    return Lengths(float(np.median(read)), float(np.median(missing)), mann_whitney(missing, read))


def _status(judgment: Judgment, candidates: Mapping[str, Candidate]) -> str:
    cut = any(candidates[c].status == "truncated" for c in judgment.candidate_ids)
    return "truncated" if cut else "complete"


def _shares(judged: Sequence[tuple[str, bool]]) -> Shares | None:
    of = Counter(kind for kind, _ in judged)
    missing = Counter(kind for kind, is_missing in judged if is_missing)
    if len(of) < 2 or not missing:
        return None
    kinds = sorted(of)
    p_value = unequal_shares([missing[k] for k in kinds], [of[k] for k in kinds])
    return Shares({k: missing[k] / of[k] for k in kinds}, p_value)
