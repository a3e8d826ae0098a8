"""Means from a few human labels and many of a judge's."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from judging.ppi import powered_mean, powered_win_rate
from judging.win_rate import win_probabilities, win_rate
from tests.judging.groups import group, judged

SHARES = st.floats(0, 1).map(lambda x: round(x, 3))


def agreeing(draw: Random, count: int, share: float) -> tuple[list[float], list[float]]:
    """Two-way verdicts of people, half for each side, and of a judge who agrees on this share."""
    human = [float(draw.random() < 0.5) for _ in range(count)]
    return human, [h if draw.random() < share else 1 - h for h in human]


def test_a_powered_mean_is_the_formula_by_hand() -> None:
    # Y = 1, 1, 0, 0; f = 1, 0, 0, 0 on the same; f' = 1, 1, 1, 0, 0, 0, 0, 0 on the rest.
    # Cov(Y, f) = (0.5 * 0.75 + 0.5 * -0.25 - 0.5 * -0.25 - 0.5 * -0.25) / 3 = 1/6.
    # All twelve f: 4 of 12, Var = (4 * 4/9 + 8 * 1/9) / 11 = 8/33.
    # lambda = (1/6) / ((1 + 4/8) * 8/33) = 11/24.
    weight = 11 / 24
    found = powered_mean([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0])
    assert found is not None
    assert found.weight == pytest.approx(weight)
    # The mean: lambda * 3/8 + (2 - lambda) / 4.
    assert found.mean == pytest.approx(weight * 3 / 8 + (2 - weight) / 4)
    # Var(f') = (3 * 25/64 + 5 * 9/64) / 7 = 15/56. Y - lambda f: 1 - lambda, 1, 0, 0.
    left = [1 - weight, 1, 0, 0]
    centre = sum(left) / 4
    spread = sum((x - centre) ** 2 for x in left) / 3
    variance = weight**2 * (15 / 56) / 8 + spread / 4
    assert found.standard_error == pytest.approx(math.sqrt(variance))
    assert found.high - found.mean == pytest.approx(1.959964 * math.sqrt(variance))
    # The labels alone have a variance of 1/3.
    assert found.effective_labels == pytest.approx(1 / 3 / variance)
    assert (found.labels, found.predictions) == (4, 8)


@given(
    st.lists(st.tuples(SHARES, SHARES), min_size=3, max_size=20),
    st.lists(SHARES, min_size=2, max_size=30),
)
def test_the_mean_moves_with_a_judge_no_further_than_the_weight_says(
    both: list[tuple[float, float]], alone: list[float]
) -> None:
    human, judge = [y for y, _ in both], [f for _, f in both]
    found = powered_mean(human, judge, alone)
    assert found is not None
    assert 0 <= found.weight <= 1
    gap = sum(alone) / len(alone) - sum(judge) / len(judge)
    assert found.mean == pytest.approx(sum(human) / len(human) + found.weight * gap)
    # A judge whose scale is another, but who says the same, changes nothing.
    shifted = powered_mean(human, [f + 3 for f in judge], [f + 3 for f in alone])
    assert shifted is not None
    assert shifted.mean == pytest.approx(found.mean, abs=1e-6)


def test_the_weight_is_where_the_variance_is_least() -> None:
    draw = Random(0)
    human, judge = agreeing(draw, 4000, 0.8)
    _, alone = agreeing(draw, 12_000, 0.8)
    found = powered_mean(human, judge, alone)
    assert found is not None

    def variance(weight: float) -> float:
        left = np.array(human) - weight * np.array(judge)
        return float(left.var(ddof=1) / len(human) + weight**2 * np.var(alone, ddof=1) / len(alone))

    best = optimize.minimize_scalar(variance, bounds=(0, 1), method="bounded")
    assert found.weight == pytest.approx(best.x, abs=0.01)
    assert found.standard_error == pytest.approx(math.sqrt(best.fun), rel=1e-4)


def test_at_75_percent_agreement_labels_are_worth_almost_a_third_more() -> None:
    draw = Random(1)
    human, judge = agreeing(draw, 5000, 0.75)
    _, alone = agreeing(draw, 200_000, 0.75)
    found = powered_mean(human, judge, alone)
    assert found is not None
    # phi = 2 * 0.75 - 1 = 0.5; the bound 1 / (1 - 0.25) = 1.333 is reached as N grows:
    # 1 / (1 - 0.25 * 200 / 205) = 1.32. The error of phi² is about 2 * 0.5 * 0.75 / sqrt(5000).
    assert found.effective_labels / 5000 == pytest.approx(1.32, abs=0.05)


def test_the_interval_holds_the_truth_although_the_judge_is_biased() -> None:
    # The judge calls three of ten of the losses wins: its mean is 0.65, the truth 0.5.
    draw, hits, narrower = Random(2), 0, 0
    for _ in range(600):
        human = [float(draw.random() < 0.5) for _ in range(600)]
        judge = [max(h, float(draw.random() < 0.3)) for h in human]
        found = powered_mean(human[:100], judge[:100], judge[100:])
        assert found is not None
        hits += found.low <= 0.5 <= found.high
        narrower += found.effective_labels > 100
    # 0.95 of 600 is 570, with a deviation of 5.3; the normal interval is a little short at n = 100.
    assert 549 <= hits <= 588
    assert narrower == 600


def test_a_judge_without_information_is_left_out() -> None:
    human = [1.0, 0.0, 1.0, 0.0]
    for judge, alone in (
        ([0.0, 1.0, 0.0, 1.0], [1.0, 0.0]),  # It contradicts people.
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0]),  # It always says the same.
        ([1.0, 0.0, 1.0, 0.0], []),  # It judged nothing but what people did.
        ([1.0, 0.0, 1.0, 0.0], [1.0]),
    ):
        found = powered_mean(human, judge, alone)
        assert found is not None
        # Var(Y) = 1/3 over four labels.
        assert (found.weight, found.mean) == (0.0, 0.5)
        assert found.standard_error == pytest.approx(math.sqrt(1 / 12))
        assert found.effective_labels == pytest.approx(4)


def test_labels_that_are_all_alike_have_no_spread() -> None:
    found = powered_mean([1.0, 1.0], [1.0, 0.0], [0.0, 1.0, 1.0])
    assert found is not None
    assert (found.mean, found.standard_error, found.effective_labels) == (1.0, 0.0, 2.0)


def test_with_fewer_than_two_human_labels_there_is_no_estimate() -> None:
    assert powered_mean([], [], [0.5, 0.7]) is None
    assert powered_mean([1.0], [0.5], [0.5, 0.7]) is None
    with pytest.raises(ValueError, match="2 human labels and 1"):
        powered_mean([1.0, 0.0], [1.0], [])


def test_a_win_rate_by_people_and_judge_counts_each_prompt_once() -> None:
    groups = [group("ours", f"theirs {n}", question=f"q{n % 6}") for n in range(12)]
    judge = [1.0, 0.0, 1.0, 0.0, 1.0, None, 1.0, 1.0, 0.0, 0.0, 1.0, None]
    human = [1.0, 0.0, 1.0, None, None, 1.0, 1.0, 0.0, None, None, None, None]
    found = powered_win_rate(groups, human, judge)
    # People and judge: q0 (1, 1), (1, 1); q1 (0, 0), (0, 1); q2 (1, 1). Judge alone: q3 0, 0 and
    # q4 1, 1; its 0 on q2 is of a prompt that people judged. Nobody's q5.
    assert found == powered_mean([1.0, 0.0, 1.0], [1.0, 0.5, 1.0], [0.0, 1.0])
    assert found is not None
    assert (found.labels, found.predictions) == (3, 2)


def test_where_people_judged_everything_the_win_rate_is_theirs() -> None:
    groups = [group("ours", "theirs", question=f"q{n}") for n in range(4)]
    verdicts = ["first", "second", "first", "tie"]
    said = [judged(g, 0, 1, None, verdict=v) for g, v in zip(groups, verdicts, strict=True)]
    human = win_probabilities(groups, said)
    plain, found = win_rate(groups, human), powered_win_rate(groups, human, [0.9, 0.2, 0.6, 0.5])
    assert plain is not None
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((plain.mean, plain.low, plain.high))
