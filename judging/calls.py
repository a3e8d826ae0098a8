"""Judgments as columns of numbers, for the noise model."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from judging.judge import Group
from judging.noise import Calls
from judging.raters import rater_of
from preferences.records import Judgment, JudgmentKind

LONGEST_LOG_ODDS = 7.0
"""P = 0.999: what a judge says beyond this is its rounding more than its opinion."""
OUTRIGHT = {"first": 1.0, "second": -1.0, "tie": 0.0}
FROM_ELSEWHERE = ("imported", "human")
"""Judgments whose order was not drawn by us: where a baseline always stands first, its quality
would pass for the judge's liking for the first place. Only pairs in both orders tell that."""
ON_A_SCALE = ("reward_model", "pointwise")
"""Judges whose scores of single answers can be subtracted; others' can only be ordered."""


@dataclass(frozen=True, slots=True)
class Call:
    """One comparison that a judgment holds."""

    judge: str
    first: str
    second: str
    value: float
    """Log-odds that the first is better; for verdicts 1, -1, or between them for a part."""
    is_soft: bool
    has_order: bool
    weight: float = 1.0
    freedom: float = 1.0


def calls_of(judgments: Iterable[Judgment]) -> Iterator[Call]:
    """The comparisons in a prompt's judgments. Failures say nothing."""
    single: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    read = [j for j in judgments if j.failure is None and all(map(math.isfinite, j.scores or ()))]
    shown = {(rater_of(j), j.candidate_ids) for j in read}
    for judgment in read:
        judge = rater_of(judgment)
        orders = (judge, judgment.candidate_ids[::-1]) in shown
        has_order = orders or judgment.kind not in FROM_ELSEWHERE
        ids, scores = judgment.candidate_ids, judgment.scores
        if len(ids) == 1:
            if scores is not None:
                single[judge, judgment.kind].append((ids[0], scores[0]))
        elif scores is not None:
            is_list = judgment.kind == "listwise"
            yield from _ordered(judge, list(zip(ids, scores, strict=True)), is_list)
        elif judgment.probability is not None:
            value, is_soft = _said(judgment.kind, judgment.probability)
            yield Call(judge, ids[0], ids[1], value, is_soft, has_order)
        elif judgment.verdict is not None:
            yield Call(judge, ids[0], ids[1], OUTRIGHT[judgment.verdict], False, has_order)
    for (judge, kind), scored in single.items():
        if kind in ON_A_SCALE:
            for (first, score), (second, other) in combinations(scored, 2):
                each = 2 / len(scored)
                yield Call(judge, first, second, score - other, True, False, each / 2, each)
        else:
            yield from _ordered(judge, scored, False)


def _shared_out(calls: Sequence[Call], size: int) -> Sequence[Call]:
    """With several judges' log-odds on a group, each judge's count for what K scores of it would.

    A judge errs about a candidate, not only about a call, and its calls repeat that. Of one judge
    alone this cannot be told; among several it would pass for certainty, and the judge with the
    least noise within its calls for the only one worth hearing.
    """
    counts = Counter(call.judge for call in calls if call.is_soft)
    if len(counts) < 2:
        return calls
    parts = {judge: min(1.0, size / count) for judge, count in counts.items()}
    return [
        replace(c, weight=parts[c.judge] / 2, freedom=parts[c.judge])
        if c.is_soft and c.freedom == 1
        else c
        for c in calls
    ]


def _ordered(judge: str, scored: Sequence[tuple[str, float]], has_order: bool) -> Iterator[Call]:
    """Verdicts on all pairs of what one judge put in order, together worth K - 1."""
    for (first, score), (second, other) in combinations(scored, 2):
        each = 2 / len(scored)
        yield Call(judge, first, second, _sign(score, other), False, has_order, each, each)


def columns(
    groups: Sequence[Group], judgments: Mapping[str, Sequence[Judgment]]
) -> list[tuple[list[int], Calls]]:
    """All that was said about the groups, by prompt id, for the groups of each size together.

    Each entry has the groups' places in `groups`. What names a candidate that is not in its group,
    or one twice, says nothing.
    """
    said = {
        g.prompt.prompt_id: list(calls_of(judgments.get(g.prompt.prompt_id, ()))) for g in groups
    }
    names = sorted({call.judge for calls in said.values() for call in calls})
    judges = {name: number for number, name in enumerate(names)}
    by_size: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        by_size[len(group.candidates)].append(number)
    found = []
    for size, numbers in sorted(by_size.items()):
        pair = {p: n for n, p in enumerate(combinations(range(size), 2))}
        rows = []
        for place, number in enumerate(numbers):
            group = groups[number]
            at = {c.candidate_id: n for n, c in enumerate(group.candidates)}
            for call in _shared_out(said[group.prompt.prompt_id], size):
                i, k = at.get(call.first, -1), at.get(call.second, -1)
                if i == k or min(i, k) < 0:
                    continue
                cell = place * len(pair) + pair[min(i, k), max(i, k)]
                sign = 1.0 if i < k else -1.0
                about = (call.value, call.is_soft, call.has_order, call.weight, call.freedom)
                rows.append((cell, sign, judges[call.judge], *about))
        table = np.array(rows, dtype=np.float64).reshape(-1, 8).T
        cells, signs, by, values, soft, ordered, weights, freedom = table
        found.append(
            (
                numbers,
                Calls(
                    groups=len(numbers),
                    size=size,
                    cell=cells.astype(np.int64),
                    sign=signs,
                    judge=by.astype(np.int64),
                    value=values,
                    is_soft=soft > 0,
                    has_order=ordered > 0,
                    weight=weights,
                    freedom=freedom,
                    judges=tuple(names),
                ),
            )
        )
    return found


def _said(kind: JudgmentKind, probability: float) -> tuple[float, bool]:
    """A probability as log-odds, or as a verdict where it is none of its own."""
    # A share of a few sampled verdicts is no log-odds, and what a person is sure of is a verdict.
    if kind == "pairwise_reasoned" or (kind == "human" and probability in (0.0, 0.5, 1.0)):
        return 2 * probability - 1, False
    low = 1 / (1 + math.exp(LONGEST_LOG_ODDS))
    inside = min(max(probability, low), 1 - low)
    return math.log(inside / (1 - inside)), True


def _sign(one: float, other: float) -> float:
    return float((one > other) - (one < other))
