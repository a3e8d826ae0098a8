"""How often one model's answers beat another's, both orders asked, with an interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from judging.judge import Group
from judging.length_control import Bout, LengthControlled, length_controlled
from judging.ranking import comparisons
from preferences.estimate import Estimate, clustered_mean
from preferences.records import Judgment


def win_probabilities(groups: Sequence[Group], judgments: Iterable[Judgment]) -> list[float | None]:
    """P(the first candidate beats the second) for groups of two: the mean over both orders.

    Each order shown weighs the same, however often it was asked. None for a group of which no
    judgment could be read.
    """
    about: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        about[judgment.candidate_ids[0]].append(judgment)
    found: list[float | None] = []
    for group in groups:
        ours, theirs = (c.candidate_id for c in group.candidates)
        theirs_and_ours = {ours, theirs}
        judged = [
            judgment
            for candidate_id in (ours, theirs)
            for judgment in about[candidate_id]
            if theirs_and_ours.issuperset(judgment.candidate_ids)
        ]
        wins: dict[str, list[float]] = defaultdict(list)
        for first, _, probability in comparisons(judged):
            wins[first].append(probability if first == ours else 1 - probability)
        means = [sum(given) / len(given) for given in wins.values()]
        found.append(sum(means) / len(means) if means else None)
    return found


def win_rate(groups: Sequence[Group], probabilities: Sequence[float | None]) -> Estimate | None:
    """The mean win probability with a 95 % interval clustered by prompt."""
    return clustered_mean(
        (group.prompt.prompt_id, probability)
        for group, probability in zip(groups, probabilities, strict=True)
        if probability is not None
    )


def length_controlled_win_rates(
    groups: Sequence[Group], probabilities: Sequence[float | None]
) -> list[LengthControlled]:
    """Each first candidate's model against the second's: the win rate if both were as long."""
    bouts = []
    for group, probability in zip(groups, probabilities, strict=True):
        if probability is not None:
            ours, theirs = group.candidates
            longer_by = len(ours.response) - len(theirs.response)
            bouts.append(Bout(ours.model, group.prompt.prompt_id, probability, longer_by))
    return length_controlled(bouts)
