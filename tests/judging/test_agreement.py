"""How a judge judged."""

from __future__ import annotations

import dataclasses

import pytest

from judging.agreement import judge_facts
from judging.win_rate import win_probabilities, win_rate
from tests.judging.groups import group, judged


def test_the_facts_of_a_judge_are_counted_by_hand() -> None:
    one, two = group("a", "b", "c", question="q1"), group("a", "b", question="q2")
    counted = dataclasses.replace(
        judged(one, 0, 1, 0.9), prompt_tokens=10, completion_tokens=1, cost=0.5
    )
    judgments = [
        counted,  # prefers a, shown first
        judged(one, 1, 0, 0.2),  # prefers a again: consistent
        judged(one, 0, 2, 0.7),  # prefers a, shown first
        judged(one, 2, 0, 0.6),  # prefers c, shown first: not consistent
        judged(one, 1, 2, 0.5),  # a tie
        judged(one, 2, 1, None, verdict="tie"),  # a tie again: consistent
        judged(two, 0, 1, None, verdict="second"),
        judged(two, 1, 0, None, failure="no verdict in reply", prompt_tokens=7),
    ]
    facts = judge_facts(judgments)
    assert facts.judgments == 8
    assert facts.failures == {"no verdict in reply": 1}
    # First preferred, of the seven read: 1 + 0 + 1 + 1 + 0.5 + 0.5 + 0 = 4.
    assert facts.first_rate == pytest.approx(4 / 7)
    # Asked in both orders and read twice: three pairs, of which two agree.
    assert facts.consistency == pytest.approx(2 / 3)
    assert (facts.prompt_tokens, facts.completion_tokens, facts.cost) == (17, 1, 0.5)


def test_a_judge_that_always_takes_the_first_is_never_consistent() -> None:
    of = group("a", "b")
    facts = judge_facts([judged(of, 0, 1, 0.8), judged(of, 1, 0, 0.8)])
    assert (facts.first_rate, facts.consistency) == (1.0, 0.0)


def test_what_nothing_bears_on_is_not_a_number() -> None:
    of = group("a", "b")
    for judgments in ([], [judged(of, 0, 1, None, scores=(1.0, 0.0))]):
        facts = judge_facts(judgments)
        assert (facts.first_rate, facts.consistency) == (None, None)


def test_a_win_probability_is_the_mean_over_both_orders() -> None:
    one, two, three = (group("ours", "theirs", question=f"q{n}") for n in range(3))
    judgments = [
        judged(one, 0, 1, 0.9),
        judged(one, 1, 0, 0.3),
        judged(two, 1, 0, None, verdict="first"),
        judged(two, 0, 1, None, failure="no verdict in reply"),
        judged(three, 0, 1, None, failure="no verdict in reply"),
    ]
    # q0: (0.9 + (1 - 0.3)) / 2 = 0.8; q1: theirs won the one that could be read; q2: none could.
    found = win_probabilities([one, two, three], judgments[::-1])
    assert found == [pytest.approx(0.8), 0.0, None]
    # Mean 0.4; sums around it ±0.4: Var = 2/1 (0.16 + 0.16) / 2² = 0.16, error 0.4.
    rate = win_rate([one, two, three], found)
    assert rate is not None
    assert rate.mean == pytest.approx(0.4)
    assert rate.high - rate.mean == pytest.approx(1.959964 * 0.4)
    assert rate.clusters == 2


def test_a_position_bias_alone_gives_one_half() -> None:
    of = group("ours", "theirs")
    (found,) = win_probabilities([of], [judged(of, 0, 1, 0.95), judged(of, 1, 0, 0.95)])
    assert found == pytest.approx(0.5)
