"""Means with clustered intervals."""

from __future__ import annotations

import math
from random import Random

import pytest

from preferences.estimate import bounded_mean, clustered_mean


def test_the_clustered_interval_is_the_formula_by_hand() -> None:
    # Values 1, 0, 1, 1 and 0 in clusters a: (1, 0), b: (1, 1), c: (0); mean 3/5.
    # Sums around the mean: a: 0.4 - 0.6 = -0.2, b: 0.4 + 0.4 = 0.8, c: -0.6.
    # Var = 3/2 (0.04 + 0.64 + 0.36) / 5² = 1.5 * 1.04 / 25 = 0.0624
    found = clustered_mean([("a", 1.0), ("b", 1.0), ("a", 0.0), ("c", 0.0), ("b", 1.0)])
    assert found is not None
    assert found.mean == pytest.approx(0.6)
    assert found.low == pytest.approx(0.6 - 1.959964 * math.sqrt(0.0624))
    assert found.high == pytest.approx(0.6 + 1.959964 * math.sqrt(0.0624))
    assert found.clusters == 3


def test_clusters_of_one_give_the_ordinary_standard_error() -> None:
    # 0, 1, 1, 1: mean 3/4, sample variance (9/16 + 3/16) / 3 = 1/4, error sqrt(1/4 / 4) = 1/4.
    found = clustered_mean([("a", 0.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)])
    assert found is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 / 4)


def test_repeating_every_answer_makes_the_interval_no_narrower() -> None:
    once = clustered_mean([("a", 0.0), ("b", 1.0), ("c", 0.5)])
    thrice = clustered_mean([("a", 0.0), ("b", 1.0), ("c", 0.5)] * 3)
    assert once is not None
    assert thrice is not None
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_nothing_to_average_has_no_mean() -> None:
    assert clustered_mean([]) is None


def test_one_cluster_has_no_interval() -> None:
    found = clustered_mean([("a", 0.0), ("a", 1.0)])
    assert found is not None
    assert (found.low, found.mean, found.high, found.clusters) == (0.5, 0.5, 0.5, 1)


def test_the_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    # 60 prompts of 3 answers that agree with their prompt: without clusters it would be too narrow.
    random, hits = Random(0), 0
    for _ in range(400):
        values = []
        for prompt in range(60):
            centre = random.gauss(0.0, 1.0)
            values += [(str(prompt), centre + random.gauss(0.0, 0.3)) for _ in range(3)]
        found = clustered_mean(values)
        assert found is not None
        hits += found.low <= 0 <= found.high
    # 0.95 of 400 is 380; four binomial standard deviations are 4 * sqrt(400 * .95 * .05) = 17.
    assert 363 <= hits <= 397


def test_prompts_that_all_agree_are_no_certainty() -> None:
    found = bounded_mean([("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)])
    assert found is not None
    # With 0, 0, 1 and 1 added: 6 of 8, mean 3/4; squares 6 · 1/16 + 2 · 9/16 = 3/2, and the error
    # is sqrt(8/7 · 3/2) / 8.
    half = 1.959964 * math.sqrt(8 / 7 * 3 / 2) / 8
    assert (found.mean, found.high, found.clusters) == (1.0, 1.0, 4)
    assert found.low == pytest.approx(3 / 4 - half)
    # Of soft verdicts too, and of a single prompt.
    soft = bounded_mean([("a", 0.6), ("b", 0.6), ("c", 0.6)])
    alone = bounded_mean([("a", 1.0)])
    assert soft is not None
    assert alone is not None
    assert soft.low < 0.45 < 0.75 < soft.high
    assert alone.low < 0.5
    assert bounded_mean([]) is None


def test_many_prompts_say_what_they_say_without_the_four() -> None:
    values = [(str(n), float(n % 4 > 0)) for n in range(4000)]
    found, plain = bounded_mean(values), clustered_mean(values)
    assert found is not None
    assert plain is not None
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=1e-3)


@pytest.mark.parametrize("size", [1, 3])
def test_few_prompts_near_the_end_are_held_nineteen_times_in_twenty(size: int) -> None:
    # 12 prompts of which 95 % are won, with answers that agree: the plain interval often is [1, 1].
    random, hits, plain_hits = Random(1), 0, 0
    for _ in range(1000):
        won = [float(random.random() < 0.95) for _ in range(12)]
        values = [(str(n), value) for n, value in enumerate(won) for _ in range(size)]
        found, plain = bounded_mean(values), clustered_mean(values)
        assert found is not None
        assert plain is not None
        hits += found.low <= 0.95 <= found.high
        plain_hits += plain.low <= 0.95 <= plain.high
    assert hits >= 950 > plain_hits
