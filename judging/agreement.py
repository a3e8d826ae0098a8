"""How judges judged, and how far they agree with each other and with people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from judging.coefficients import (
    Coefficient,
    cohen_kappa,
    decided_agreement,
    krippendorff_alpha,
    pairwise_agreement,
)
from judging.judge import Group
from judging.raters import TIE
from judging.tallies import EVERYONE, JUDGES, PEOPLE, Table, Tallies, count, empty_table
from preferences.records import Judgment

MAX_CATEGORIES = 50
"""Categories with figures of their own: those with the most judgments."""


@dataclass(frozen=True)
class JudgeFacts:
    """What one judge's judgments came to and what they cost."""

    judgments: int
    failures: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    cost: float


@dataclass(frozen=True)
class RaterFacts:
    """How one rater judged. A share is None where nothing bears on it; ties count as half."""

    rater: str
    """The judge's name, and the annotator's where there is one."""
    category: str | None
    """Of the prompts, empty for those without one; None for all prompts."""
    human: bool
    judgments: int
    missing: float
    """Share of the judgments that hold no verdict."""
    unusable: int
    """Judgments on candidates that are not among the prompt's, or on one against itself."""
    pairs: int
    """Pairs of answers with a verdict, both orders taken together."""
    consistency: float | None
    """Share of the pairs asked in both orders in which the same answer was preferred twice."""
    first_rate: float | None
    """Share of the comparisons in which the answer shown first was preferred."""
    longer_wins: float | None
    """Share of the pairs of different lengths in which the longer answer was preferred."""
    family: str | None
    """Of the judge's model, as `gpt`; None where its name does not tell."""
    family_wins: float | None
    """Share of wins of the family's answers against others, where another rater judged them too."""
    family_wins_by_others: float | None
    """The same answers' share by the raters of no or another family, each pair counting once."""


@dataclass(frozen=True)
class Between:
    """How far two raters agree on the pairs that both judged; all people are one side."""

    one: str
    other: str
    category: str | None
    pairs: int
    """Each person's verdict on a pair counts."""
    agreement: Coefficient
    """Share of the same verdicts; a tie agrees with a tie alone."""
    decided: Coefficient
    """The same where neither said tie."""
    kappa: Coefficient


@dataclass(frozen=True)
class Reliability:
    """How far several raters agree, beyond chance: Krippendorff's alpha."""

    raters: str
    category: str | None
    pairs: int
    """Judged by two or more."""
    nominal: Coefficient
    ordinal: Coefficient
    """A win against a loss is worse than a win against a tie."""


@dataclass(frozen=True)
class Agreement:
    """How judges judged, and how far they and people agree: all prompts first, then by category."""

    raters: tuple[RaterFacts, ...]
    between: tuple[Between, ...]
    reliability: tuple[Reliability, ...]


def judge_facts(judgments: Iterable[Judgment]) -> JudgeFacts:
    """The facts of one judge."""
    failures: Counter[str] = Counter()
    total = prompt_tokens = completion_tokens = 0
    cost = 0.0
    for judgment in judgments:
        total += 1
        prompt_tokens += judgment.prompt_tokens or 0
        completion_tokens += judgment.completion_tokens or 0
        cost += judgment.cost or 0.0
        if judgment.failure is not None:
            # What follows the colon can differ from call to call.
            failures[judgment.failure.partition(":")[0]] += 1
    return JudgeFacts(total, dict(sorted(failures.items())), prompt_tokens, completion_tokens, cost)


def agreement(
    judged: Iterable[tuple[Group, Sequence[Judgment]]],
    judge_models: Mapping[str, str] | None = None,
    candidate_models: Mapping[str, str] | None = None,
) -> Agreement:
    """How all judges of a dataset judged and agree; read once, a prompt at a time.

    `judged` holds each prompt's group with everything that was said about it. What a rater said of
    a pair is one verdict: the better side by the mean over the orders shown, so that a liking for
    the first place cancels out. The models of the judges and of the candidates are by their names
    in the records, where these do not tell.
    """
    tallies = Tallies(judge_models or {}, candidate_models or {})
    for group, judgments in judged:
        count(tallies, group, judgments)
    judgments_of: Counter[str] = Counter()
    for (category, _), tally in tallies.raters.items():
        judgments_of[category] += int(tally["judgments"])
    scopes: list[tuple[str | None, Mapping[str, int]]] = [(None, judgments_of)]
    if any(judgments_of):
        largest = dict(judgments_of.most_common(MAX_CATEGORIES))
        scopes += [(category, {category: largest[category]}) for category in sorted(largest)]
    return Agreement(
        raters=tuple(r for scope in scopes for r in _raters(tallies, *scope)),
        between=tuple(b for scope in scopes for b in _between(tallies, *scope)),
        reliability=tuple(r for scope in scopes for r in _reliability(tallies, *scope)),
    )


def _raters(
    tallies: Tallies, category: str | None, within: Mapping[str, int]
) -> Iterator[RaterFacts]:
    for rater in sorted({r for c, r in tallies.raters if c in within}):
        total: dict[str, float] = defaultdict(float)
        for name in within:
            for what, number in tallies.raters.get((name, rater), {}).items():
                total[what] += number
        yield RaterFacts(
            rater=rater,
            category=category,
            human=rater in tallies.people,
            judgments=int(total["judgments"]),
            missing=total["failures"] / total["judgments"],
            unusable=int(total["unusable"]),
            pairs=int(total["pairs"]),
            consistency=_share(total["consistent"], total["both_orders"]),
            first_rate=_share(total["first"], total["shown"]),
            longer_wins=_share(total["longer"], total["uneven"]),
            family=tallies.families[rater],
            family_wins=_share(total["family"], total["family_pairs"]),
            family_wins_by_others=_share(total["family_by_others"], total["family_pairs"]),
        )


def _between(
    tallies: Tallies, category: str | None, within: Mapping[str, int]
) -> Iterator[Between]:
    for one, other in sorted({(a, b) for c, a, b in tallies.between if c in within}):
        table = _sum(tallies.between.get((name, one, other)) for name in within)
        yield Between(
            one=one,
            other=other,
            category=category,
            pairs=int(sum(map(sum, table))),
            agreement=pairwise_agreement(table),
            decided=decided_agreement(table, TIE),
            kappa=cohen_kappa(table),
        )


def _reliability(
    tallies: Tallies, category: str | None, within: Mapping[str, int]
) -> Iterator[Reliability]:
    for group in (JUDGES, PEOPLE, EVERYONE):
        pairs = sum(tallies.shared[name, group] for name in within)
        if pairs:
            table = _sum(tallies.together.get((name, group)) for name in within)
            yield Reliability(
                raters=group,
                category=category,
                pairs=pairs,
                nominal=krippendorff_alpha(table, "nominal"),
                ordinal=krippendorff_alpha(table, "ordinal"),
            )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _sum(tables: Iterable[Table | None]) -> Table:
    total = empty_table()
    for table in tables:
        for row, counts in enumerate(table or []):
            for column, number in enumerate(counts):
                total[row][column] += number
    return total
