"""The posterior over the candidates' quality, from judgments to rankings."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from judging.calls import calls_of
from judging.judge import Group
from judging.noise import JudgeNoise, Noise
from judging.ranking import (
    best_probabilities,
    comparisons,
    expected_regret,
    learn_noise,
    rank,
    win_probability,
)
from preferences.records import Judgment, Ranking
from tests.judging.groups import group, judged

Array = npt.NDArray[np.float64]


def two(mean: float, variance: float) -> Ranking:
    """A ranking of two whose difference has this mean and this variance."""
    half = variance / 2
    return Ranking("p", ("a", "b"), (mean / 2, -mean / 2), (half, 0.0, 0.0, half), ("j",))


def logistic_normal(mean: float, variance: float) -> float:
    """E σ(x) for x ~ N(mean, variance), integrated numerically."""
    spread = math.sqrt(variance)

    def integrand(z: float) -> float:
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / (1 + math.exp(-mean - spread * z))

    return float(quad(integrand, -10, 10)[0])


def test_one_outright_verdict_is_worth_about_two_to_one() -> None:
    # By symmetry θ = (t, -t). Given u, P(first) : P(second) : P(tie) = e^(x/2) : e^(-x/2) : e^-2
    # with x = 2t + u; θ's difference has prior variance 4 and u has 0.05, so at the mode
    # 2t / 4 = u / 0.05 = slope(x), and x = 4.05 · slope(x).
    def shares(x: float) -> tuple[float, float]:
        weights = math.exp(x / 2), math.exp(-x / 2), math.exp(-2)
        return weights[0] / sum(weights), weights[1] / sum(weights)

    def slope(x: float) -> float:
        first, second = shares(x)
        return (1 - (first - second)) / 2

    x = brentq(lambda x: 4.05 * slope(x) - x, 0, 5)
    first, second = shares(x)
    curvature = (first + second - (first - second) ** 2) / 4
    variance = 1 / (1 / 4 + curvature / (1 + 0.05 * curvature))
    mean = 4 * slope(x)
    of = group("yes", "no")
    (ranking,) = rank([of], [judged(of, 0, 1, None, verdict="first")])
    assert ranking.mean[0] - ranking.mean[1] == pytest.approx(mean, abs=1e-8)
    expected = 1 / (1 + math.exp(-mean / math.sqrt(1 + math.pi * variance / 8)))
    assert win_probability(ranking, 0, 1) == pytest.approx(expected, abs=1e-9)
    assert win_probability(ranking, 0, 1) == pytest.approx(0.68, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(st.floats(-8, 8), st.floats(0, 3.5))
def test_win_probability_is_the_mean_of_the_logistic_normal(mean: float, variance: float) -> None:
    found = win_probability(two(mean, variance), 0, 1)
    assert found == pytest.approx(logistic_normal(mean, variance), abs=0.01)
    assert win_probability(two(mean, variance), 1, 0) == pytest.approx(1 - found)


PROBABILITIES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
ASKED = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), PROBABILITIES).filter(lambda c: c[0] != c[1]),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(ASKED, st.randoms())
def test_swapping_sides_and_shuffling_judgments_change_no_ranking(asked: list, random) -> None:  # type: ignore[no-untyped-def,type-arg]
    of = group("a", "b", "c", "d")
    straight = [judged(of, one, other, p) for one, other, p in asked]
    swapped = [judged(of, other, one, 1 - p) for one, other, p in asked]
    random.shuffle(swapped)
    (expected,), (found,) = rank([of], straight), rank([of], swapped)
    assert found.candidate_ids == expected.candidate_ids
    assert found.mean == pytest.approx(expected.mean, abs=1e-8)
    assert found.covariance == pytest.approx(expected.covariance, abs=1e-8)


@settings(max_examples=30, deadline=None)
@given(ASKED, st.permutations(range(4)))
def test_a_ranking_follows_the_candidates_wherever_they_stand(
    asked: list[tuple[int, int, float]], order: list[int]
) -> None:
    of = group("a", "b", "c", "d")
    moved = Group(of.prompt, tuple(of.candidates[n] for n in order))
    judgments = [judged(of, one, other, p) for one, other, p in asked]
    (expected,), (found,) = rank([of], judgments), rank([moved], judgments)
    assert found.mean == pytest.approx([expected.mean[n] for n in order], abs=1e-8)


@given(st.floats(0.5, 1.0))
def test_a_liking_for_the_first_place_cancels_out_over_both_orders(bias: float) -> None:
    of = group("a", "b", "c")
    asked = [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    (ranking,) = rank([of], [judged(of, one, other, bias) for one, other in asked])
    assert ranking.mean == pytest.approx((0, 0, 0), abs=1e-9)
    assert win_probability(ranking, 0, 1) == pytest.approx(0.5)


def test_candidates_never_compared_keep_the_prior() -> None:
    of = group("a", "b", "c")
    (ranking,) = rank([of], [])
    assert ranking.mean == (0, 0, 0)
    assert np.reshape(ranking.covariance, (3, 3)) == pytest.approx(2 * np.eye(3))
    assert ranking.judgment_ids == ()


def test_groups_of_any_sizes_keep_their_places() -> None:
    groups = [group(*"abcd"[:n], question=f"q{n}") for n in (2, 4, 1, 3, 2)]
    groups[4] = group("x", "y", question="last")
    judgments = [judged(of, 0, 1, 1.0) for of in groups if len(of.candidates) > 1]
    rankings = list(rank(groups, judgments[::-1]))
    assert [r.prompt_id for r in rankings] == [g.prompt.prompt_id for g in groups]
    assert [len(r.mean) for r in rankings] == [2, 4, 1, 3, 2]
    assert all(r.mean[0] > r.mean[1] for r in rankings if len(r.mean) > 1)


def test_a_failure_is_neither_a_tie_nor_a_win() -> None:
    of = group("a", "b")
    failed = judged(of, 0, 1, None, failure="no verdict in reply")
    assert list(calls_of([failed])) == []
    assert list(comparisons([failed])) == []


def test_verdicts_scores_and_ties_count_as_they_say() -> None:
    of = group("a", "b")
    a, b = (c.candidate_id for c in of.candidates)
    said = [
        judged(of, 0, 1, None, verdict="second"),
        judged(of, 1, 0, None, verdict="tie"),
        judged(of, 0, 1, 0.75),
        judged(of, 1, 0, None, scores=(3.0, 2.0)),
        judged(of, 0, 1, None, scores=(1.0, 1.0)),
    ]
    expected = [(a, b, 0.0), (b, a, 0.5), (a, b, 0.75), (b, a, 1.0), (a, b, 0.5)]
    assert list(comparisons(said)) == expected
    heard = [(call.first, call.second, call.value, call.is_soft) for call in calls_of(said)]
    assert heard == [
        (a, b, -1.0, False),
        (b, a, 0.0, False),
        (a, b, pytest.approx(math.log(3)), True),
        (b, a, 1.0, False),
        (a, b, 0.0, False),
    ]


def test_a_baseline_that_always_stands_first_in_a_table_is_not_held_for_liked() -> None:
    """Fifty prompts whose table always shows the baseline first, and it always wins."""
    groups = [group("baseline", "a", "b", question=f"q{n}") for n in range(50)]
    said = [
        replace(judged(of, 0, other, 0.9), kind="imported") for of in groups for other in (1, 2)
    ]
    noise = learn_noise(groups, said)
    for ranking in rank(groups, said, noise):
        assert win_probability(ranking, 0, 1) > 0.6
    # Our own judges' order is drawn: always the first is then a liking, and tells nothing.
    assert [call.has_order for call in calls_of(said[:1])] == [False]
    assert [call.has_order for call in calls_of([judged(groups[0], 0, 1, 0.9)])] == [True]


def test_a_table_with_both_orders_of_a_pair_tells_its_judges_liking_for_the_first_place() -> None:
    of = group("a", "b", "c")
    both = [replace(judged(of, *pair, 0.9), kind="imported") for pair in ((0, 1), (1, 0), (0, 2))]
    assert [call.has_order for call in calls_of(both)] == [True, True, False]


def test_scores_of_one_answer_each_are_compared_within_a_judge() -> None:
    of = group("a", "b")
    a, b = (c.candidate_id for c in of.candidates)

    def scored(candidate: str, judge: str, kind: str, score: float) -> Judgment:
        name = f"{candidate}{judge}{kind}"
        prompt_id = of.prompt.prompt_id
        return Judgment(name, prompt_id, kind, judge, (candidate,), scores=(score,))  # type: ignore[arg-type]

    # A reward model's scores are log-odds: σ(1.5 - 0.5) = 0.7311. A verifier's are only ordered.
    rewards = [scored(a, "rm", "reward_model", 1.5), scored(b, "rm", "reward_model", 0.5)]
    assert list(comparisons(rewards)) == [(a, b, pytest.approx(1 / (1 + math.exp(-1))))]
    checks = [scored(a, "v", "verifier", 0.1), scored(b, "v", "verifier", 0.9)]
    assert list(comparisons(checks)) == [(a, b, 0.0)]
    apart = [scored(a, "one", "feedback", 1.0), scored(b, "other", "feedback", 0.0)]
    assert list(comparisons(apart)) == []


def test_judges_are_ranked_by_their_own_noise() -> None:
    of = group("a", "b")
    said = [judged(of, 0, 1, 0.8), judged(of, 1, 0, 0.8)]
    (fair,) = rank([of], said)
    assert fair.mean[0] == pytest.approx(fair.mean[1])
    # A judge known to add log 4 to the first place: it saw no difference either time.
    biased = Noise({"j": JudgeNoise(bias=math.log(4))})
    (one_order,) = rank([of], said[:1], biased)
    assert one_order.mean[0] == pytest.approx(one_order.mean[1])


def test_noise_is_learnt_from_judgments_of_groups_of_any_size() -> None:
    groups = [group(*"abcd"[: 2 + n % 3], question=f"q{n}") for n in range(150)]
    said = []
    for of in groups:
        for one in range(len(of.candidates)):
            for other in range(len(of.candidates)):
                if one != other:
                    lead = 0.8 * (other - one) + 1.0
                    said.append(judged(of, one, other, 1 / (1 + math.exp(-lead))))
    assert learn_noise(groups, said).of("j").bias == pytest.approx(1.0, abs=0.05)


def test_the_chance_of_being_best_is_that_of_independent_normals() -> None:
    # Of two: Φ(1 / √(0.5 + 0.5)) = 0.8413. The best of them beats the first by E max(d, 0) for
    # d ~ N(-1, 1): φ(1) - Φ(-1) = 0.2420 - 0.1587.
    mean, covariance = np.array([[1.0, 0.0]]), np.array([[[0.5, 0.0], [0.0, 0.5]]])
    assert best_probabilities(mean, covariance)[0, 0] == pytest.approx(0.8413, abs=0.03)
    assert expected_regret(mean, covariance)[0] == pytest.approx(0.2420 - 0.1587, abs=0.02)
    equal = best_probabilities(np.zeros((1, 4)), np.eye(4)[None])
    assert equal[0] == pytest.approx([0.25] * 4, abs=0.04)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_says_nothing(score: float) -> None:
    of = group("a", "b", "c")
    said = [
        Judgment(f"s{n}", of.prompt.prompt_id, "reward_model", "rm", (c.candidate_id,),
                 scores=(score if n == 0 else float(n),))
        for n, c in enumerate(of.candidates)
    ]  # fmt: skip
    (ranking,) = rank([of], said, learn_noise([of], said))
    assert np.isfinite(ranking.mean).all()
    assert ranking.mean[0] == pytest.approx(0, abs=1e-9)
    assert ranking.mean[2] > ranking.mean[1]


@pytest.mark.parametrize("unit", [0.01, 1.0, 1000.0])
def test_the_unit_of_a_reward_model_does_not_matter(unit: float) -> None:
    generator = np.random.default_rng(0)
    groups = [group("a", "b", "c", "d", question=f"q{n}") for n in range(60)]
    said = [
        Judgment(f"{c.candidate_id}", of.prompt.prompt_id, "reward_model", "rm", (c.candidate_id,),
                 scores=(unit * float(generator.normal()),))
        for of in groups
        for c in of.candidates
    ]  # fmt: skip
    rankings = list(rank(groups, said, learn_noise(groups, said)))
    sure = [win_probability(r, int(np.argmax(r.mean)), int(np.argmin(r.mean))) for r in rankings]
    # Of four normal scores the best and the worst are 2.06 deviations apart on average; half of
    # that is the reward model's own noise by default.
    assert 0.75 < float(np.mean(sure)) < 0.9


def test_a_judge_of_whom_nothing_is_heard_takes_nothing_from_a_good_one() -> None:
    generator = np.random.default_rng(1)
    groups = [group("a", "b", "c", "d", question=f"q{n}") for n in range(150)]
    good, useless = [], []
    for of in groups:
        quality = generator.normal(0, 1.4, 4)
        for one in range(4):
            for other in range(4):
                if one != other:
                    lead = quality[one] - quality[other] + generator.normal(0, 1)
                    good.append(judged(of, one, other, 1 / (1 + math.exp(-lead))))
                    useless.append(replace(judged(of, one, other, 0.7), judge="useless"))

    def sureness(said: list[Judgment]) -> float:
        found = rank(groups, said, learn_noise(groups, said))
        means = [np.array(r.mean) for r in found]
        return float(np.mean([m.max() - m.min() for m in means]))

    # Something is taken off: with two judges, errors about a candidate are allowed for.
    assert sureness(good + useless) > 0.6 * sureness(good)
