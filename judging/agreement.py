"""How a judge judged: what could not be read, what changed with the order, what came first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from preferences.records import Judgment

LEANING: dict[str | None, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class JudgeFacts:
    """Counts and rates of one judge's judgments. A rate is None where nothing bears on it."""

    judgments: int
    failures: dict[str, int]
    first_rate: float | None
    """Share of comparisons in which the answer shown first was preferred; ties count as half."""
    consistency: float | None
    """Share of the pairs asked in both orders in which the same answer was preferred twice."""
    prompt_tokens: int
    completion_tokens: int
    cost: float


def judge_facts(judgments: Iterable[Judgment]) -> JudgeFacts:
    """The facts of one judge; its judgments come sorted by prompt, as the store holds them."""
    failures: Counter[str] = Counter()
    total = shown = pairs = consistent = prompt_tokens = completion_tokens = 0
    first = cost = 0.0
    for _, of_prompt in groupby(judgments, key=lambda j: j.prompt_id):
        leanings: dict[tuple[str, ...], float] = {}
        for judgment in of_prompt:
            total += 1
            prompt_tokens += judgment.prompt_tokens or 0
            completion_tokens += judgment.completion_tokens or 0
            cost += judgment.cost or 0.0
            if judgment.failure is not None:
                failures[judgment.failure] += 1
                continue
            leaning = judgment.probability
            if leaning is None:
                leaning = LEANING.get(judgment.verdict)
            if leaning is None:
                continue  # Scores stand for themselves, whatever the order.
            shown += 1
            first += _preferred(leaning)
            leanings[judgment.candidate_ids] = leaning
        for (one, other), leaning in leanings.items():
            if one < other and (other, one) in leanings:
                pairs += 1
                consistent += _preferred(leaning) == 1 - _preferred(leanings[other, one])
    return JudgeFacts(
        judgments=total,
        failures=dict(sorted(failures.items())),
        first_rate=first / shown if shown else None,
        consistency=consistent / pairs if pairs else None,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost=cost,
    )


def _preferred(leaning: float) -> float:
    return 0.5 if leaning == 0.5 else float(leaning > 0.5)
