"""Win rates as they would be if both answers were equally long."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from judging.length_control import NEARLY_FREE, Bout, LengthControlled, length_controlled

WINS = st.floats(0, 1)
LENGTHS = st.integers(-3000, 3000)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def loss(logits: np.ndarray, wins: np.ndarray) -> float:
    """The negative log-likelihood of a logistic regression."""
    return float((np.logaddexp(0, logits) - wins * logits).sum())


def rate(result: LengthControlled) -> float:
    assert result.controlled is not None
    return result.controlled.mean


def rates(results: list[LengthControlled]) -> list[float]:
    return [rate(result) for result in results]


def qualities(models: int, seed: int) -> list[float]:
    """In logits against the baseline."""
    return [float(np.random.default_rng([seed, model]).uniform(-2, 1)) for model in range(models)]


def planted(
    models: int, prompts: int, length_effect: float, seed: int
) -> tuple[list[Bout], list[float]]:
    """Bouts by the model itself, and the win rates at equal lengths.

    Models differ in how good they are and how long they answer, prompts in how hard they are.
    """
    draw = np.random.default_rng(seed)
    hard = draw.normal(0, 1.2, prompts)
    bouts, truth = [], []
    for model, quality in enumerate(qualities(models, seed)):
        longer_by = draw.normal(draw.uniform(-800, 800), 600, prompts)
        tilt = length_effect * np.tanh(longer_by / longer_by.std(ddof=1))
        wins = sigmoid(quality + tilt + hard)
        truth.append(float(sigmoid(quality + hard).mean()))
        bouts += [
            Bout(f"m{model}", f"q{n}", float(wins[n]), float(longer_by[n])) for n in range(prompts)
        ]
    return bouts, truth


def test_planted_win_rates_at_equal_lengths_are_found() -> None:
    bouts, truth = planted(models=8, prompts=400, length_effect=1.5, seed=0)
    found = length_controlled(bouts)
    off = [abs(r.raw - t) for r, t in zip(found, truth, strict=True)]
    assert max(off) > 0.1  # Length moved the raw ones far.
    assert rates(found) == pytest.approx(truth, abs=0.015)
    assert [r.length_effect for r in found] == pytest.approx([1.5] * 8, abs=0.25)


def test_of_one_model_alone_too() -> None:
    for seed in range(5):
        bouts, truth = planted(models=1, prompts=2000, length_effect=1.5, seed=seed)
        (found,) = length_controlled(bouts)
        assert rate(found) == pytest.approx(truth[0], abs=0.03)
        assert abs(found.raw - truth[0]) > 2 * abs(rate(found) - truth[0])


def outright(bouts: list[Bout], draw: np.random.Generator) -> list[Bout]:
    """The same bouts, each won or lost."""
    return [dataclasses.replace(b, win=float(draw.random() < b.win)) for b in bouts]


@pytest.mark.parametrize(("models", "runs"), [(1, 200), (4, 50)])
def test_the_interval_holds_the_truth_nineteen_times_in_twenty(models: int, runs: int) -> None:
    draw, hits = np.random.default_rng(11), 0
    # The truth is that of all prompts that could be asked, by quadrature over how hard they are.
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    for seed in range(runs):
        bouts, _ = planted(models, prompts=300, length_effect=1.0, seed=seed)
        found = length_controlled(outright(bouts, draw))
        for result, quality in zip(found, qualities(models, seed), strict=True):
            true = float(weights @ sigmoid(quality + 1.2 * nodes) / weights.sum())
            assert result.controlled is not None
            hits += result.controlled.low <= true <= result.controlled.high
    # 0.95 of 200 is 190; four binomial standard deviations are 4 * sqrt(200 * .95 * .05) = 12.
    assert 178 <= hits <= 200


def test_repeating_every_bout_makes_the_interval_no_narrower() -> None:
    bouts, _ = planted(models=1, prompts=2000, length_effect=1.0, seed=1)
    once, thrice = (
        length_controlled(bouts)[0].controlled,
        length_controlled(bouts * 3)[0].controlled,
    )
    assert once is not None
    assert thrice is not None
    # The prior weighs a third as much, so the two are close and not the same.
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), abs=0.001)


def test_without_a_liking_for_length_nothing_is_corrected() -> None:
    bouts, truth = planted(models=6, prompts=800, length_effect=0.0, seed=3)
    for result, true in zip(length_controlled(bouts), truth, strict=True):
        assert result.raw == pytest.approx(true)
        assert rate(result) == pytest.approx(true, abs=0.005)


def test_the_fit_of_one_model_is_that_of_a_general_optimiser() -> None:
    draw = np.random.default_rng(5)
    longer_by, wins = draw.normal(-200, 500, 60), draw.uniform(0, 1, 60)
    (found,) = length_controlled(
        Bout("m", f"q{n}", float(wins[n]), float(longer_by[n])) for n in range(60)
    )
    length = np.tanh(longer_by / np.std(longer_by, ddof=1))

    def posterior(x: np.ndarray) -> float:
        return loss(x[0] + x[1] * length, wins) + NEARLY_FREE * x[0] ** 2 / 2 + x[1] ** 2 / 2

    theta, phi = optimize.minimize(posterior, np.zeros(2), tol=1e-10).x
    assert found.length_effect == pytest.approx(phi, abs=1e-4)
    assert rate(found) == pytest.approx(float(sigmoid(theta)), abs=1e-5)
    assert found.raw == pytest.approx(wins.mean())


def test_the_fit_of_several_models_is_that_of_a_general_optimiser() -> None:
    bouts, _ = planted(models=3, prompts=12, length_effect=1.0, seed=7)
    wins = np.array([b.win for b in bouts]).reshape(3, 12)
    longer_by = np.array([b.longer_by for b in bouts]).reshape(3, 12)
    length = np.tanh(longer_by / longer_by.std(axis=1, ddof=1, keepdims=True))

    def together(x: np.ndarray) -> float:
        theta, phi, hard = x[:3], x[3], x[4:]
        fit = loss(theta[:, None] + phi * length + hard, wins)
        return fit + (NEARLY_FREE * (theta**2).sum() + NEARLY_FREE * phi**2 + (hard**2).sum()) / 2

    shared = optimize.minimize(together, np.zeros(16), tol=1e-10).x
    phi, hard = shared[3], shared[4:]
    for model, found in enumerate(length_controlled(bouts)):

        def alone(x: np.ndarray, model: int = model) -> float:
            fit = loss(x[0] + x[1] * length[model] + x[2] * hard, wins[model])
            return fit + (NEARLY_FREE * x[0] ** 2 + (x[1] - phi) ** 2 + (x[2] - 1) ** 2) / 2

        theta, own_phi, psi = optimize.minimize(alone, np.array([0, phi, 1]), tol=1e-10).x
        assert found.length_effect == pytest.approx(own_phi, abs=1e-4)
        assert rate(found) == pytest.approx(float(sigmoid(theta + psi * hard).mean()), abs=1e-5)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), WINS, LENGTHS), max_size=30))
def test_win_rates_are_finite_and_turn_around_with_the_sides(
    rows: list[tuple[int, int, float, int]],
) -> None:
    bouts = [Bout(f"m{m}", f"q{q}", win, longer) for m, q, win, longer in rows]
    turned = [dataclasses.replace(b, win=1 - b.win, longer_by=-b.longer_by) for b in bouts]
    for one, other in zip(length_controlled(bouts), length_controlled(turned), strict=True):
        assert (one.model, one.bouts) == (other.model, other.bouts)
        assert one.raw == pytest.approx(1 - other.raw)
        assert (one.controlled is None) == (one.length_effect is None) == (other.controlled is None)
        if one.controlled is not None and other.controlled is not None:
            assert one.length_effect is not None
            assert math.isfinite(one.length_effect)
            assert 0 < one.controlled.mean < 1
            assert one.controlled.mean == pytest.approx(1 - other.controlled.mean, abs=1e-6)
            assert one.controlled.low == pytest.approx(1 - other.controlled.high, abs=1e-6)
            assert one.controlled.clusters == len(
                {b.prompt_id for b in bouts if b.model == one.model}
            )


@pytest.mark.parametrize("win", [0.0, 1.0])
def test_a_model_that_never_or_always_wins_has_a_finite_win_rate(win: float) -> None:
    bouts = [Bout("m", f"q{n}", win, 100.0 * n - 2000) for n in range(40)]
    (found,) = length_controlled(bouts)
    assert found.raw == win
    assert rate(found) == pytest.approx(win, abs=0.01)


def test_a_model_that_wins_where_all_others_lose_is_fitted_too() -> None:
    # Where all are so sure, a whole Newton step leaps over the top and never comes back.
    draw = np.random.default_rng(0)
    names = [*(f"m{n}" for n in range(20)), "contrary"]
    bouts = [
        Bout(name, f"q{n}", float((n < 30) != (name == "contrary")), float(draw.normal(0, 500)))
        for name in names
        for n in range(40)
    ]
    # Lengths say nothing here, so the win rates stay what they are: 30 and 10 of 40.
    found = length_controlled(bouts)
    assert rates(found) == pytest.approx([0.75] * 20 + [0.25], abs=0.02)


def test_wins_that_length_explains_wholly_are_half_at_equal_lengths() -> None:
    bouts = [Bout("m", f"q{n}", float(n >= 20), 100.0 * n - 1950) for n in range(40)]
    (found,) = length_controlled(bouts)
    assert rate(found) == pytest.approx(0.5)
    assert found.length_effect is not None
    assert found.length_effect > 2


def test_where_lengths_differ_by_the_same_nothing_tells_length_from_quality() -> None:
    same = [Bout("same", f"q{n}", 0.3, 50.0) for n in range(9)]
    once = [Bout("once", "q0", 0.9, 10.0)]
    found = length_controlled([*same, *once])
    assert [r.controlled for r in found] == [None, None]
    assert [r.raw for r in found] == pytest.approx([0.3, 0.9])
    assert length_controlled([]) == []


def test_prompts_that_few_models_answered_leave_each_model_to_itself() -> None:
    bouts, _ = planted(models=2, prompts=50, length_effect=1.0, seed=9)
    together = length_controlled(bouts)
    apart = [length_controlled(b for b in bouts if b.model == r.model)[0] for r in together]
    assert together == apart


def test_all_judgments_tied_give_one_half() -> None:
    bouts = [Bout(f"m{m}", f"q{n}", 0.5, 10.0 * n * (m + 1)) for m in range(4) for n in range(10)]
    assert rates(length_controlled(bouts)) == pytest.approx([0.5] * 4)
