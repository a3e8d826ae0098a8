"""The posterior over the candidates' quality."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq, minimize

from judging.judge import Group
from judging.ranking import comparisons, fit, rank, win_counts, win_probability
from preferences.records import Judgment, Ranking
from tests.judging.groups import group, judged

Array = npt.NDArray[np.float64]


def scipy_mode(wins: Array) -> tuple[Array, Array]:
    """Mode and inverse Hessian of the log-posterior, written pair by pair: θ ~ N(0, 2)."""
    size = len(wins)

    def loss(theta: Array) -> float:
        total = float(theta @ theta) / 4
        for i in range(size):
            for j in range(size):
                total += wins[i, j] * float(np.logaddexp(0.0, theta[j] - theta[i]))
        return total

    def gradient(theta: Array) -> Array:
        found = theta / 2
        for i in range(size):
            for j in range(size):
                surprise = wins[i, j] / (1 + math.exp(theta[i] - theta[j]))
                found[i] -= surprise
                found[j] += surprise
        return found

    def hessian(theta: Array) -> Array:
        found = np.eye(size) / 2
        for i in range(size):
            for j in range(size):
                p = 1 / (1 + math.exp(theta[i] - theta[j]))
                away = np.zeros(size)
                away[i], away[j] = (1.0, -1.0) if i != j else (0.0, 0.0)
                found += wins[i, j] * p * (1 - p) * np.outer(away, away)
        return found

    start = np.zeros(size)
    done = minimize(
        loss, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-10}
    )
    return done.x, np.linalg.inv(hessian(done.x))


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


def random_wins(seed: int, size: int) -> Array:
    generator = np.random.default_rng(seed)
    wins = generator.uniform(0, 1, (size, size)) * generator.integers(0, 6, (size, size))
    np.fill_diagonal(wins, 0)
    return np.asarray(wins, dtype=np.float64)


def undefeated(wins: Array) -> Array:
    wins = wins.copy()
    wins[:, 0] = 0
    return wins


def disconnected(wins: Array) -> Array:
    wins = wins.copy()
    wins[:2, 2:] = wins[2:, :2] = 0
    return wins


def only_ties(wins: Array) -> Array:
    return (wins + wins.T) / 2


def lopsided(wins: Array) -> Array:
    return np.triu(1000 * wins)


def nothing(wins: Array) -> Array:
    return np.zeros_like(wins)


@pytest.mark.parametrize(
    "shape",
    [lambda wins: wins, undefeated, disconnected, only_ties, lopsided, nothing],
    ids=["any", "undefeated", "disconnected", "only ties", "lopsided", "nothing"],
)
def test_the_fit_is_scipys_mode_and_inverse_hessian(shape: object) -> None:
    assert callable(shape)
    for size in (2, 3, 5, 8):
        many = np.stack([shape(random_wins(seed, size)) for seed in range(4)])
        means, covariances = fit(many)
        for wins, mean, covariance in zip(many, means, covariances, strict=True):
            expected_mean, expected_covariance = scipy_mode(wins)
            assert np.abs(mean - expected_mean).max() < 1e-6
            assert np.abs(covariance - expected_covariance).max() < 1e-6


def test_a_group_fits_the_same_alone_as_among_others() -> None:
    many = np.stack([random_wins(seed, 4) * 10 ** (seed % 4) for seed in range(12)])
    together, _ = fit(many)
    alone = np.concatenate([fit(wins[None])[0] for wins in many])
    assert np.abs(together - alone).max() < 1e-8


def test_one_outright_verdict_is_worth_about_two_to_one() -> None:
    # By symmetry θ = (t, -t), with σ(-2t) = t / 2. The difference has curvature w + 1/4 along it:
    # its variance is 1 / (w + 1/4) for w = σ(2t)(1 - σ(2t)).
    t = brentq(lambda x: 1 / (1 + math.exp(2 * x)) - x / 2, 0, 2)
    w = (t / 2) * (1 - t / 2)
    expected = 1 / (1 + math.exp(-2 * t / math.sqrt(1 + math.pi / 8 / (w + 0.25))))
    of = group("yes", "no")
    (ranking,) = rank([of], [judged(of, 0, 1, None, verdict="first")])
    assert win_probability(ranking, 0, 1) == pytest.approx(expected, abs=1e-9)
    assert win_probability(ranking, 0, 1) == pytest.approx(0.68, abs=0.005)
    assert win_probability(ranking, 0, 1) == pytest.approx(
        logistic_normal(2 * t, 1 / (w + 0.25)), abs=0.01
    )


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
    assert win_counts(of, [failed]).tolist() == [[0, 0], [0, 0]]


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
    # a: 0 + 0.5 + 0.75 + 0 + 0.5 = 1.75 of five; b has the rest.
    assert win_counts(of, said).tolist() == [[0, 1.75], [3.25, 0]]


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
