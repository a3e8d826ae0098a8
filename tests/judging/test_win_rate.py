"""How often one model's answers beat another's."""

from __future__ import annotations

import dataclasses

import pytest

from judging.length_control import Bout, length_controlled
from judging.win_rate import length_controlled_win_rates, win_probabilities, win_rate
from tests.judging.groups import group, judged


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


def test_an_order_asked_twice_weighs_no_more_than_the_other() -> None:
    of = group("ours", "theirs")
    asked = [judged(of, 0, 1, 0.9), judged(of, 0, 1, 0.7), judged(of, 1, 0, 0.6)]
    # Shown first (0.9 + 0.7) / 2 = 0.8, shown second 1 - 0.6 = 0.4; the mean of both is 0.6.
    assert win_probabilities([of], asked) == [pytest.approx(0.6)]


def test_a_judgment_of_an_unknown_answer_says_nothing() -> None:
    of = group("ours", "theirs")
    stranger = group("ours", "another's", question="another question")
    odd = dataclasses.replace(
        judged(of, 0, 1, 0.9),
        candidate_ids=(of.candidates[0].candidate_id, stranger.candidates[1].candidate_id),
    )
    assert win_probabilities([of], [odd]) == [None]
    assert win_probabilities([of], [odd, judged(of, 0, 1, 0.3)]) == [pytest.approx(0.3)]


def test_ties_alone_give_one_half_and_failures_alone_nothing() -> None:
    of = group("ours", "theirs")
    ties = [judged(of, 0, 1, None, verdict="tie"), judged(of, 1, 0, None, verdict="tie")]
    assert win_probabilities([of], ties) == [0.5]
    failed = [judged(of, 0, 1, None, failure="f"), judged(of, 1, 0, None, failure="f")]
    assert win_probabilities([of], failed) == [None]
    assert win_probabilities([of], []) == [None]
    assert win_rate([of], [None]) is None
    assert win_rate([], []) is None


def test_at_equal_lengths_the_characters_of_both_answers_count() -> None:
    lengths = [(10, 30), (20, 20), (50, 10), (5, 9)]
    groups = [
        group("a" * ours, "b" * theirs, question=f"q{n}")
        for n, (ours, theirs) in enumerate(lengths)
    ]
    probabilities = [0.2, 0.5, 0.9, None]
    bouts = [
        Bout("model 0", groups[n].prompt.prompt_id, win, longer_by)
        for n, (win, longer_by) in enumerate([(0.2, -20), (0.5, 0), (0.9, 40)])
    ]
    assert length_controlled_win_rates(groups, probabilities) == length_controlled(bouts)
    assert length_controlled_win_rates(groups, [None] * 4) == []
