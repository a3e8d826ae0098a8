"""The probability of a ranking: by hand, by all orders there are, and where it is a pair's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from training.plackett_luce import Unrankable, plackett_luce_loss, stages


def loss(scores: list[float], pairs: list[tuple[int, int]]) -> float:
    return float(plackett_luce_loss(torch.tensor(scores, dtype=torch.float64), pairs))


BY_FOUR_TWO_ONE = [math.log(4), math.log(2), math.log(1)]
"""Scores of which an answer is drawn 4 : 2 : 1."""


def test_a_ranking_is_drawn_from_the_best_to_the_worst() -> None:
    # 4/7 that the first is drawn first, then 2/3 that the second is.
    found = loss(BY_FOUR_TWO_ONE, [(0, 1), (0, 2), (1, 2)])
    assert found == pytest.approx(-math.log(4 / 7 * 2 / 3), abs=1e-14)


def test_what_follows_from_other_pairs_needs_no_pair() -> None:
    assert loss(BY_FOUR_TWO_ONE, [(0, 1), (1, 2)]) == loss(
        BY_FOUR_TWO_ONE, [(0, 1), (0, 2), (1, 2)]
    )


def test_of_a_tie_both_orders_count() -> None:
    # The third is last: 4/7·2/3 for 0, 1, 2 and 2/7·4/5 for 1, 0, 2.
    found = loss(BY_FOUR_TWO_ONE, [(0, 2), (1, 2)])
    assert found == pytest.approx(-math.log(8 / 21 + 8 / 35), abs=1e-14)
    # The first is first, whatever comes then.
    assert loss(BY_FOUR_TWO_ONE, [(0, 1), (0, 2)]) == pytest.approx(-math.log(4 / 7), abs=1e-14)


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_of_two_answers_it_is_the_loss_of_dpo(better: float, worse: float) -> None:
    difference = torch.tensor(better - worse, dtype=torch.float64)
    assert loss([better, worse], [(0, 1)]) == pytest.approx(
        float(-logsigmoid(difference)), rel=1e-12, abs=1e-14
    )


def test_pairs_without_a_common_answer_say_nothing_of_each_other() -> None:
    scores = [0.3, -1.2, 2.0, 0.1]
    apart = loss(scores, [(0, 1)]) + loss(scores, [(3, 2)])
    assert loss(scores, [(0, 1), (3, 2)]) == pytest.approx(apart, abs=1e-14)


@st.composite
def partial_orders(draw: st.DrawFn) -> tuple[list[float], list[tuple[int, int]]]:
    number = draw(st.integers(2, 5))
    scores = draw(st.lists(st.floats(-3, 3), min_size=number, max_size=number))
    every = list(itertools.combinations(draw(st.permutations(range(number))), 2))
    return scores, draw(st.lists(st.sampled_from(every), min_size=1, unique=True))


def by_all_orders(scores: list[float], pairs: list[tuple[int, int]]) -> float:
    total = 0.0
    for order in itertools.permutations(range(len(scores))):
        if all(order.index(better) < order.index(worse) for better, worse in pairs):
            total += math.prod(
                math.exp(scores[n]) / math.fsum(math.exp(scores[m]) for m in order[place:])
                for place, n in enumerate(order)
            )
    return -math.log(total)


@given(partial_orders())
def test_it_is_the_sum_over_all_rankings_that_agree(
    drawn: tuple[list[float], list[tuple[int, int]]],
) -> None:
    assert loss(*drawn) == pytest.approx(by_all_orders(*drawn), rel=1e-10, abs=1e-10)


def test_its_gradient_is_that_of_its_values() -> None:
    scores = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    pairs = [(0, 1), (0, 3), (2, 3)]
    assert torch.autograd.gradcheck(lambda s: plackett_luce_loss(s, pairs), scores)


def test_pairs_that_no_ranking_agrees_with_are_refused() -> None:
    with pytest.raises(Unrankable, match="circle"):
        loss([0.0, 0.0, 0.0], [(0, 1), (1, 2), (2, 0)])
    with pytest.raises(Unrankable, match="circle"):
        loss([0.0, 0.0], [(0, 1), (1, 0)])


def test_answers_that_may_come_in_nearly_any_order_are_too_many_to_sum_over() -> None:
    # All before one: any set of them can be left, 2^K.
    assert len(stages(frozenset((n, 9) for n in range(9)))) == 2**9 - 1
    with pytest.raises(Unrankable, match="too much open"):
        stages(frozenset((n, 11) for n in range(11)))
    # One before all, and one after another, are few.
    assert len(stages(frozenset((0, n) for n in range(1, 12)))) == 1
    assert len(stages(frozenset(itertools.combinations(range(12), 2)))) == 11
