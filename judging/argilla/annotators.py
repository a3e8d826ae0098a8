"""How people do while they label: how much, how fast, how right, and how far they agree."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations, pairwise

from judging.argilla.labels import Answer
from judging.coefficients import Coefficient, add_unit, krippendorff_alpha, pairwise_agreement
from judging.gold import Gold
from judging.raters import opinions, verdict_of
from judging.tallies import empty_table
from preferences.judge_tables import NamedTable, percent

LEAST_GOLD_RIGHT, FEWEST_GOLD = 0.8, 5
"""Somebody who has answered so many gold questions is expected to be right on such a share."""
LEAST_ALPHA, FEWEST_PAIRS = 0.4, 10
"""The same of people's agreement; by chance it is 0."""
BREAK_SECONDS = 1800.0
"""A longer time between two answers was not spent on the second."""


@dataclass(frozen=True)
class Annotator:
    """What one person has done so far."""

    name: str
    answers: int
    """Of all purposes, gold too."""
    seconds: float | None
    """Median time between two answers, without breaks; None before there are two."""
    last: datetime
    gold_answers: int
    gold_right: int
    """A tie is not right."""
    shared: int
    """Verdicts of others on pairs that this one judged too; gold left out."""
    agreed: int
    """How many of these say the same."""


@dataclass(frozen=True)
class Crowd:
    """What all of them have done so far."""

    annotators: tuple[Annotator, ...]
    """Those with the most answers first."""
    pairs: int
    """Pairs of answers that two people or more judged; gold left out."""
    agreement: Coefficient
    """Share of the same verdicts among two people's on one pair; a tie agrees with a tie alone."""
    alpha: Coefficient
    """Krippendorff's, nominal: 1 is perfect, 0 is chance."""


def crowd(answers: Iterable[Answer], gold: Iterable[Gold] = ()) -> Crowd:
    """Count what people have said; a ranking is a verdict on each two of its answers.

    Gold questions that are not among `gold` any more are neither right nor wrong.
    """
    by_name: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_name[answer.annotator].append(answer)
    better = {one.question.question_id: one.better for one in gold}
    counts, coincidences, pairs = empty_table(), empty_table(), 0
    shared: dict[str, int] = defaultdict(int)
    agreed: dict[str, int] = defaultdict(int)
    for verdicts in _verdicts(a for given in by_name.values() for a in given):
        pairs += len(verdicts) > 1
        add_unit(coincidences, list(verdicts.values()))
        for one, other in combinations(verdicts, 2):
            counts[verdicts[one]][verdicts[other]] += 1
            for name in (one, other):
                shared[name] += 1
                agreed[name] += verdicts[one] == verdicts[other]
    found = []
    for name, given in by_name.items():
        measured = [a for a in given if a.about.question_id in better]
        found.append(
            Annotator(
                name=name,
                answers=len(given),
                seconds=_seconds([a.at for a in given]),
                last=max(a.at for a in given),
                gold_answers=len(measured),
                gold_right=sum(_best(a) == better[a.about.question_id] for a in measured),
                shared=shared[name],
                agreed=agreed[name],
            )
        )
    found.sort(key=lambda one: (-one.answers, one.name))
    agreement, alpha = pairwise_agreement(counts), krippendorff_alpha(coincidences)
    return Crowd(tuple(found), pairs, agreement, alpha)


def warnings(crowd: Crowd) -> Iterator[str]:
    """What somebody ought to look into before going on, a sentence each."""
    for one in crowd.annotators:
        if one.gold_answers >= FEWEST_GOLD:
            right = one.gold_right / one.gold_answers
            if right < LEAST_GOLD_RIGHT:
                yield (
                    f"{one.name} is right on {one.gold_right} of {one.gold_answers} gold questions "
                    f"({right:.0%}, below {LEAST_GOLD_RIGHT:.0%}): read some answers, explain the "
                    "guidelines, or leave this annotator's answers out"
                )
    alpha = crowd.alpha.value
    if crowd.pairs >= FEWEST_PAIRS and alpha is not None and alpha < LEAST_ALPHA:
        yield (
            f"people agree little beyond chance on {crowd.pairs:,} pairs (Krippendorff's alpha "
            f"{alpha:.2f}, below {LEAST_ALPHA}): the guidelines may leave open what is better, or "
            "the answers may be too much alike"
        )


def tables(crowd: Crowd) -> list[NamedTable]:
    """The same for a terminal; a table without rows is left out."""
    header = ("annotator", "answers", "seconds each", "gold right", "agrees with others", "last")
    rows = tuple(map(_cells, crowd.annotators))
    together = NamedTable(
        "Agreement of people",
        ("pairs judged by two or more", "same verdict", "Krippendorff's alpha"),
        ((f"{crowd.pairs:,}", _shown(crowd.agreement, ".1%"), _shown(crowd.alpha, ".3f")),),
        "A tie agrees with a tie alone; alpha is 1 where all agree and 0 by chance.",
    )
    return [NamedTable("Annotators", header, rows), together] if rows else []


def _verdicts(answers: Iterable[Answer]) -> Iterator[dict[str, int]]:
    """Of each pair of answers that somebody judged: what each person said, gold left out."""
    by_pair: dict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)
    for answer in answers:
        if answer.about.purpose == "gold":
            continue
        for opinion in opinions([answer.judgment]):
            # Each pair in one direction, whatever was shown first.
            swapped = opinion.second < opinion.first
            leaning = 1 - opinion.leaning if swapped else opinion.leaning
            one, other = sorted((opinion.first, opinion.second))
            verdict = verdict_of(leaning)
            by_pair[answer.about.prompt_id, one, other][answer.annotator] = verdict
    yield from by_pair.values()


def _best(answer: Answer) -> str | None:
    """The candidate that was preferred of two; None for a tie."""
    place = {"first": 0, "second": 1}.get(str(answer.said))
    return None if place is None else answer.about.shown[place]


def _seconds(times: Sequence[datetime]) -> float | None:
    gaps = [(after - before).total_seconds() for before, after in pairwise(sorted(times))]
    spent = [gap for gap in gaps if gap <= BREAK_SECONDS]
    return statistics.median(spent) if spent else None


def _cells(one: Annotator) -> tuple[str, ...]:
    right = f" ({one.gold_right / one.gold_answers:.0%})" if one.gold_answers else ""
    return (
        one.name,
        f"{one.answers:,}",
        "" if one.seconds is None else f"{one.seconds:.0f}",
        f"{one.gold_right} of {one.gold_answers}{right}",
        percent(one.agreed / one.shared if one.shared else None),
        f"{one.last:%Y-%m-%d %H:%M} UTC",
    )


def _shown(coefficient: Coefficient, form: str) -> str:
    return coefficient.missing if coefficient.value is None else format(coefficient.value, form)
