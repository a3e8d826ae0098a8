"""What raters said, counted a prompt at a time: all that is remembered of the prompts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from judging.coefficients import add_unit
from judging.judge import Group
from judging.raters import FIRST, family_of, is_human, opinions, rater_of, verdict_of
from preferences.records import Candidate, Judgment

PEOPLE = "human annotators"
"""What all people together are called beside the judges."""
JUDGES = "all judges"
EVERYONE = "judges and people"

Pair = tuple[str, str]
"""The ids of two answers in their order as texts: ids come from content, so that order says nothing
of which answer is better."""
Table = list[list[float]]
"""Three by three: counts by verdicts, in the order of `raters`."""
Tally = dict[str, float]
"""Of one rater. `family` and the like: see `_count_families`."""


@dataclass
class Tallies:
    """Counts that can be added up; keys begin with the prompt's category, empty for none."""

    judge_models: Mapping[str, str]
    """By the judge's name, where that does not tell the model."""
    candidate_models: Mapping[str, str]
    raters: dict[tuple[str, str], Tally] = field(default_factory=dict)
    between: dict[tuple[str, str, str], Table] = field(default_factory=dict)
    """Of two sides: the rows are the verdicts of the one whose name comes first."""
    together: dict[tuple[str, str], Table] = field(default_factory=dict)
    """Coincidences among JUDGES, PEOPLE and EVERYONE."""
    shared: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Pairs that two or more of them judged."""
    people: set[str] = field(default_factory=set)
    families: dict[str, str | None] = field(default_factory=dict)


def count(tallies: Tallies, group: Group, judgments: Sequence[Judgment]) -> None:
    """Add everything that was said about one prompt's answers."""
    category = group.prompt.category or ""
    candidates = {c.candidate_id: c for c in group.candidates}
    usable = [j for j in judgments if _is_usable(tallies, category, candidates, j)]
    for (one, other), verdicts in _verdicts(tallies, category, usable).items():
        _count_lengths(tallies, category, candidates[one], candidates[other], verdicts)
        _count_families(tallies, category, candidates[one], candidates[other], verdicts)
        _count_together(tallies, category, verdicts)


def _is_usable(
    tallies: Tallies, category: str, candidates: Mapping[str, Candidate], judgment: Judgment
) -> bool:
    rater = rater_of(judgment)
    tally = tallies.raters.setdefault((category, rater), defaultdict(float))
    tally["judgments"] += 1
    if rater not in tallies.families:
        person = is_human(judgment)
        tallies.families[rater] = None if person else _family(tallies.judge_models, judgment.judge)
        if person:
            tallies.people.add(rater)
    if judgment.failure is not None:
        tally["failures"] += 1
        return False
    ids = set(judgment.candidate_ids)
    if len(ids) < len(judgment.candidate_ids) or not candidates.keys() >= ids:
        tally["unusable"] += 1
        return False
    return True


def _verdicts(
    tallies: Tallies, category: str, judgments: Iterable[Judgment]
) -> dict[Pair, dict[str, int]]:
    """One verdict for each pair and rater, by the mean over the orders shown.

    Within an order, the mean over what was said in it: a duplicate does not outweigh the other
    order.
    """
    said: dict[tuple[Pair, str], dict[bool | None, list[float]]]
    said = defaultdict(lambda: defaultdict(list))
    for opinion in opinions(judgments):
        if opinion.has_order:
            tally = tallies.raters[category, opinion.rater]
            tally["shown"] += 1
            tally["first"] += _won(verdict_of(opinion.leaning))
        swapped = opinion.second < opinion.first
        order = swapped if opinion.has_order else None
        if swapped:
            pair, leaning = (opinion.second, opinion.first), 1 - opinion.leaning
        else:
            pair, leaning = (opinion.first, opinion.second), opinion.leaning
        said[pair, opinion.rater][order].append(leaning)
    verdicts: dict[Pair, dict[str, int]] = defaultdict(dict)
    for (pair, rater), orders in said.items():
        means = {order: sum(given) / len(given) for order, given in orders.items()}
        tally = tallies.raters[category, rater]
        if True in means and False in means:
            tally["both_orders"] += 1
            tally["consistent"] += verdict_of(means[True]) == verdict_of(means[False])
        tally["pairs"] += 1
        verdicts[pair][rater] = verdict_of(sum(means.values()) / len(means))
    return verdicts


def _count_lengths(
    tallies: Tallies,
    category: str,
    one: Candidate,
    other: Candidate,
    verdicts: Mapping[str, int],
) -> None:
    difference = len(one.response) - len(other.response)
    if not difference:
        return
    for rater, verdict in verdicts.items():
        tally = tallies.raters[category, rater]
        tally["uneven"] += 1
        tally["longer"] += _won(verdict, difference > 0)


def _count_families(
    tallies: Tallies,
    category: str,
    one: Candidate,
    other: Candidate,
    verdicts: Mapping[str, int],
) -> None:
    """Wins of the answers of a judge's own family, by it and, on the same pairs, by the others.

    Others are people and judges of another or no known family. Each pair counts once.
    """
    families = [_family(tallies.candidate_models, c.model) for c in (one, other)]
    if families[0] == families[1]:
        return
    for rater, verdict in verdicts.items():
        family = tallies.families[rater]
        if family is None or family not in families:
            continue
        is_first = families[0] == family
        others = [
            _won(its, is_first) for r, its in verdicts.items() if tallies.families[r] != family
        ]
        if others:
            tally = tallies.raters[category, rater]
            tally["family_pairs"] += 1
            tally["family"] += _won(verdict, is_first)
            tally["family_by_others"] += sum(others) / len(others)


def _count_together(tallies: Tallies, category: str, verdicts: Mapping[str, int]) -> None:
    def side(rater: str) -> str:
        return PEOPLE if rater in tallies.people else rater

    for one, other in combinations(sorted(verdicts, key=lambda r: (side(r), r)), 2):
        table = tallies.between.setdefault((category, side(one), side(other)), empty_table())
        table[verdicts[one]][verdicts[other]] += 1
    people = [verdict for rater, verdict in verdicts.items() if rater in tallies.people]
    judges = [verdict for rater, verdict in verdicts.items() if rater not in tallies.people]
    everyone = [*judges, *people] if judges and people else []
    for name, given in ((JUDGES, judges), (PEOPLE, people), (EVERYONE, everyone)):
        if len(given) > 1:
            add_unit(tallies.together.setdefault((category, name), empty_table()), given)
            tallies.shared[category, name] += 1


def _family(models: Mapping[str, str], name: str) -> str | None:
    return family_of(models.get(name, name))


def _won(verdict: int, first: bool = True) -> float:
    """What a verdict gives the first answer, or else the second: 1, 0, or 0.5 for a tie."""
    share = verdict / FIRST
    return share if first else 1 - share


def empty_table() -> Table:
    """No verdicts yet."""
    return [[0.0] * 3 for _ in range(3)]
