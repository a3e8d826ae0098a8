"""From what judges think to what people would say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from judging.calibration import (
    Calibration,
    Families,
    Label,
    calibrate,
    fit,
    fit_isotonic,
    fit_terms,
    labels_of,
    lacking,
    probabilities,
    reliability,
)
from judging.ranking import rank, win_probability
from preferences.records import Candidate, Judgment
from tests.judging.groups import group, judged

Array = npt.NDArray[np.float64]


def drawn(
    count: int, scale: float, length: float = 0.0, family: float = 0.0, seed: int = 0
) -> list[Label]:
    """Labels by people whose log-odds are `scale` times the judges', with terms of their own."""
    generator = np.random.default_rng(seed)
    labels = []
    for number in range(count):
        mean, variance = float(generator.normal(0, 3)), float(generator.uniform(0, 2))
        longer, own = float(generator.normal(0, 0.5)), float(generator.integers(-1, 2))
        logit = (scale * mean + length * longer + family * own) / math.sqrt(
            1 + math.pi * scale**2 * variance / 8
        )
        won = float(generator.random() < 1 / (1 + math.exp(-logit)))
        # Half of E (θ_i - θ_k)².
        spread = (mean**2 + variance) / 2
        labels.append(Label(f"p{number // 2}", mean, variance, longer, own, won, spread))
    return labels


@pytest.mark.parametrize("residual", [0.0, 1.3])
def test_the_fit_is_scipys(residual: float) -> None:
    labels = drawn(120, 0.4, -0.8, 0.6)

    def loss(point: Array) -> float:
        scale, length, family = math.exp(point[0]), point[1], point[2]
        total = (1.0 * point[0] ** 2 + 4.0 * length**2 + 4.0 * family**2) / 2
        for x in labels:
            logit = (scale * x.mean + length * x.length + family * x.family) / math.sqrt(
                1 + math.pi * (scale**2 * x.variance + 2 * residual) / 8
            )
            total += math.log1p(math.exp(-logit)) if x.won else math.log1p(math.exp(logit))
        return float(total)

    best = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-8}).x
    found = fit_terms(labels, residual)
    assert found.scale == pytest.approx(math.exp(best[0]), rel=1e-4)
    assert found.length == pytest.approx(best[1], abs=1e-4)
    assert found.family == pytest.approx(best[2], abs=1e-4)


def test_the_scale_and_the_likings_of_judges_are_found() -> None:
    found = fit_terms(drawn(8000, 0.3, -0.7, 0.5), 0.0)
    assert found.scale == pytest.approx(0.3, abs=0.03)
    assert found.length == pytest.approx(-0.7, abs=0.15)
    assert found.family == pytest.approx(0.5, abs=0.12)


def test_no_labels_leave_the_judges_as_they_are() -> None:
    assert fit([]) == Calibration(1.0, 0.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000))
def test_turning_every_pair_round_changes_nothing(seed: int) -> None:
    labels = drawn(60, 0.5, 0.3, -0.2, seed)
    turned = [
        replace(x, mean=-x.mean, length=-x.length, family=-x.family, won=1 - x.won) for x in labels
    ]
    one, other = fit(labels), fit(turned)
    assert (one.scale, one.length, one.family) == pytest.approx(
        (other.scale, other.length, other.family), abs=1e-7
    )
    assert probabilities(turned, other) == pytest.approx(1 - probabilities(labels, one))


def test_two_hundred_labels_calibrate_judges_that_are_too_sure() -> None:
    unseen = drawn(4000, 0.25, -0.6, seed=1)
    won = np.array([x.won for x in unseen])
    before = reliability(probabilities(unseen, Calibration()), won)
    fits = [fit(drawn(200, 0.25, -0.6, seed=seed)) for seed in range(2, 22)]
    after = [reliability(probabilities(unseen, found), won) for found in fits]
    assert before.ece > 0.12
    assert sum(x.ece for x in after) / 20 < 0.04
    assert sum(x.nll for x in after) / 20 < 0.8 * before.nll


def test_what_judges_do_not_explain_of_people_is_left_open() -> None:
    # The judges' θ has variance E[m² + s²] / 2 = (9 + 1) / 2 = 5; a² · 5 + r² = 2 while a < √0.4.
    labels = drawn(4000, 0.3)
    found = fit(labels)
    variance = sum(x.mean**2 + x.variance for x in labels) / len(labels) / 2
    assert variance == pytest.approx(5, rel=0.1)
    assert found.residual == pytest.approx(2 - found.scale**2 * variance, abs=1e-3)
    # It makes people's verdicts count for more and leaves the probabilities as they were.
    without = probabilities(labels, fit_terms(labels, 0.0))
    assert probabilities(labels, found) == pytest.approx(without, abs=0.03)


def test_figures_are_of_pairs_the_fit_has_not_seen() -> None:
    """Labels that are coin flips: a fit that had seen them would look better than a coin."""
    generator = np.random.default_rng(0)
    labels = [replace(x, won=float(generator.random() < 0.5)) for x in drawn(60, 1.0)]
    found = calibrate(labels)
    assert found.labels == 60
    assert found.prompts == 30
    assert found.after.nll > math.log(2)
    assert found.isotonic.nll > math.log(2)
    assert found.before.nll > found.after.nll


def test_a_reliability_diagram_counts_every_label_once_from_the_winners_side() -> None:
    # Four say 0.9 (or 0.1, for the other side) and three of them agree; one says 0.5 and is a tie.
    probability = np.array([0.9, 0.1, 0.9, 0.9, 0.5])
    won = np.array([1.0, 0.0, 1.0, 0.0, 0.5])
    found = reliability(probability, won)
    assert [b.labels for b in found.bins] == [1, 1, 1, 1, 1]
    assert sum(b.seen for b in found.bins) == 3.5
    # One label a bin: |0.5 - 0.5| + three of |1 - 0.9| + |0 - 0.9|, over five.
    assert found.ece == pytest.approx((0 + 3 * 0.1 + 0.9) / 5)
    expected = -(3 * math.log(0.9) + math.log(0.1) + math.log(0.5)) / 5
    assert found.nll == pytest.approx(expected, abs=1e-6)


def test_isotonic_regression_pools_what_falls() -> None:
    # From one side: 0.6 → 0, 0.7 → 1, 0.8 → 1, 0.9 → 0; the last three pool to 2/3, as do the
    # mirrored ones to 1/3; 0.6 → 0 and its mirror 0.4 → 1 pool to 1/2.
    at = fit_isotonic(np.array([0.6, 0.7, 0.8, 0.9]), np.array([0.0, 1.0, 1.0, 0.0]))
    assert at([0.8, 0.2, 0.5]) == pytest.approx([2 / 3, 1 / 3, 1 / 2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=1))
def test_isotonic_maps_never_fall_and_know_no_sides(said: list[tuple[float, float]]) -> None:
    probability, won = np.array(said).T
    found = fit_isotonic(probability, won)
    grid = np.linspace(0, 1, 101)
    values = found(grid)
    assert (np.diff(values) >= -1e-12).all()
    assert values + found(1 - grid) == pytest.approx(np.ones(101), abs=1e-9)
    assert values.min() > 0
    assert values.max() < 1


def person(of: object, first: int, second: int, verdict: str, annotator: str = "ann") -> Judgment:
    said = judged(of, first, second, None, verdict=verdict)  # type: ignore[arg-type]
    return replace(said, kind="human", judge="people", annotator=annotator)


def test_labels_are_peoples_verdicts_with_what_the_judges_thought() -> None:
    of = group("short", "a much longer answer")
    (ranking,) = rank([of], [judged(of, 0, 1, 0.9), judged(of, 1, 0, 0.1)])
    candidates = {c.candidate_id: c for c in of.candidates}
    unknown = replace(person(of, 0, 1, "first"), candidate_ids=("x", "y"))
    found = list(labels_of(ranking, candidates, [person(of, 1, 0, "first"), unknown], Families()))
    (label,) = found
    # Stored from the candidate that stands first, whom the person did not prefer.
    assert label.won == 0.0
    assert label.mean == pytest.approx(ranking.mean[0] - ranking.mean[1])
    assert label.mean > 0
    assert label.length == pytest.approx(math.log(6) - math.log(21))
    c = ranking.covariance
    assert label.variance == pytest.approx(c[0] + c[3] - c[1] - c[2])
    assert label.spread == pytest.approx((label.mean**2 + label.variance) / 2)


def test_a_pair_is_one_label_however_many_people_judged_it() -> None:
    of = group("a", "b", "c")
    (ranking,) = rank([of], [judged(of, 0, 1, 0.9), judged(of, 1, 2, 0.9)])
    people = [
        person(of, 0, 1, "first", "ann"),
        person(of, 1, 0, "first", "bob"),
        person(of, 0, 1, "tie", "cid"),
        person(of, 2, 1, "second", "ann"),
    ]
    candidates = {c.candidate_id: c for c in of.candidates}
    found = list(labels_of(ranking, candidates, people, Families()))
    # One for each side and one for neither: a half. And ann prefers the second to the third.
    assert [label.won for label in found] == [0.5, 1.0]


def test_two_liked_answers_are_not_a_tie() -> None:
    of = group("a", "b", "c")
    (ranking,) = rank([of], [judged(of, 0, 1, 0.9)])
    likes = [
        Judgment(f"like {n}", of.prompt.prompt_id, "human", "people", (c.candidate_id,),
                 scores=(float(n < 2),))
        for n, c in enumerate(of.candidates)
    ]  # fmt: skip
    candidates = {c.candidate_id: c for c in of.candidates}
    found = list(labels_of(ranking, candidates, likes, Families()))
    assert [label.won for label in found] == [1.0, 1.0]


@pytest.mark.parametrize("scale", [-0.2, -1.0, -5.0])
def test_the_fit_ends_at_the_top_where_people_contradict_the_judges(scale: float) -> None:
    labels = drawn(200, scale)
    found = fit_terms(labels, 2.0)

    def height(log_scale: float) -> float:
        moved = replace(found, scale=math.exp(log_scale))
        p = np.clip(probabilities(labels, moved), 1e-12, 1 - 1e-12)
        won = np.array([x.won for x in labels])
        fits = won * np.log(p) + (1 - won) * np.log1p(-p)
        ridge = log_scale**2 + 4 * found.length**2 + 4 * found.family**2
        return float(fits.sum() - ridge / 2)

    here = math.log(found.scale)
    assert found.scale < 0.3
    assert height(here) >= max(height(here - 0.01), height(here + 0.01))


def test_too_few_labels_are_said_to_be_too_few() -> None:
    few = drawn(12, 1.0)
    assert lacking(few) == (
        "12 pairs on 6 prompts were judged by people and by judges; calibration needs 50 on 20"
    )
    assert lacking(drawn(60, 1.0)) is None


def test_a_family_is_told_by_the_model_behind_a_candidate() -> None:
    families = Families(frozenset({"qwen"}), {"model 0": "Qwen/Qwen3-8B"})
    of = group("a", "b")
    assert [families.same(c) for c in of.candidates] == [1.0, 0.0]


def test_calibrated_rankings_shrink_and_shift_what_the_judges_said() -> None:
    of = group("x" * 9, "y" * 99)
    said = [judged(of, 0, 1, 0.02), judged(of, 1, 0, 0.98)]
    (raw,) = rank([of], said)
    (found,) = rank([of], said, None, Calibration(scale=0.5, length=-1.0))
    # Half the judges' difference, less log 100 - log 10 for the longer.
    gap = 0.5 * (raw.mean[1] - raw.mean[0]) - math.log(10)
    assert found.mean[1] - found.mean[0] == pytest.approx(gap, abs=1e-8)
    assert found.covariance == pytest.approx([0.25 * x for x in raw.covariance])
    assert found.judgment_ids == raw.judgment_ids


def test_people_move_a_calibrated_ranking_their_way_and_stand_in_it() -> None:
    of = group("a", "b")
    said = [judged(of, 0, 1, 0.6), judged(of, 1, 0, 0.4)]
    people = [person(of, 0, 1, "second", f"annotator {n}") for n in range(3)]
    calibration = Calibration(residual=1.5)
    (machine,) = rank([of], said, None, calibration)
    (found,) = rank([of], said + people, None, calibration)
    assert win_probability(machine, 0, 1) > 0.55
    # Three people against judges who see a slight difference.
    assert win_probability(found, 0, 1) < 0.3
    assert len(found.judgment_ids) == 5


def test_the_candidates_of_no_judgment_at_all_are_ranked_by_the_calibrated_prior() -> None:
    of = group("x" * 9, "y" * 99)
    (found,) = rank([of], [], None, Calibration(scale=2.0))
    assert found.mean == pytest.approx((0, 0))
    assert isinstance(of.candidates[0], Candidate)
    assert found.covariance == pytest.approx((8, 0, 0, 8))
