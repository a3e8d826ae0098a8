"""From what judges think to what people would say."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def asked(count: int, people: int, variance: float, seen: float, seed: int = 0) -> list[Label]:
    """Pairs judged by several people to whom quality varies so much, of which judges see a part."""
    generator = np.random.default_rng(seed)
    # The judges' own: of variance 2, known up to 0.4 for a difference.
    scale, residual = math.sqrt(variance * seen / 2), variance * (1 - seen)
    labels = []
    for number in range(count):
        mean = float(generator.normal(0, math.sqrt(2 * 2 - 0.4)))
        d = generator.normal(scale * mean, math.sqrt(scale**2 * 0.4 + 2 * residual))
        won = float(generator.binomial(people, 1 / (1 + math.exp(-d)))) / people
        labels.append(Label(f"p{number}", mean, 0.4, 0.0, 0.0, won, 2.0, people))
    return labels


def surprise_of(labels: list[Label]) -> Callable[[Array], float]:
    """Minus the log posterior by the formulas of the docstrings, integrated over d itself."""
    d = np.linspace(-60, 60, 6001)
    spread = sum(x.spread for x in labels) / len(labels)

    def surprise(point: Array) -> float:
        variance, worth = math.exp(point[0]), math.exp(point[1])
        residual = 1 / (1 / variance + worth / 2)
        scale = math.sqrt((variance - residual) / spread)
        # 1 / v ~ Gamma(2, mean 1/2), log c ~ N(log 2, 0.7²), γ and δ ~ N(0, 1/4); the density of
        # log v is that of 1 / v over v.
        total = 2 * point[0] + 4 / variance + 4 * (point[2] ** 2 + point[3] ** 2) / 2
        total += (point[1] - math.log(2)) ** 2 / (2 * 0.7**2)
        for x in labels:
            middle = scale * x.mean + point[2] * x.length + point[3] * x.family
            square = scale**2 * x.variance + 2 * residual
            density = np.exp(-((d - middle) ** 2) / (2 * square)) / math.sqrt(2 * math.pi * square)
            first = x.won * x.people
            votes = (1 + np.exp(-d)) ** -first * (1 + np.exp(d)) ** (first - x.people)
            total -= x.weight * math.log(np.trapezoid(density * votes, d))
        return float(total)

    return surprise


def test_the_fit_is_scipys() -> None:
    generator = np.random.default_rng(3)
    labels = [
        replace(x, people=n, won=generator.binomial(n, 0.2 + 0.6 * x.won) / n, weight=n / 4)
        for x, n in zip(drawn(40, 0.6, -0.8, 0.6), [1, 2, 3, 4] * 10, strict=True)
    ]
    best = minimize(surprise_of(labels), np.array([0.7, 1.0, 0.0, 0.0]), method="BFGS").x
    spread = sum(x.spread for x in labels) / len(labels)
    residual = 1 / (math.exp(-best[0]) + math.exp(best[1]) / 2)
    found = fit(labels)
    assert found.scale == pytest.approx(
        math.sqrt((math.exp(best[0]) - residual) / spread), rel=1e-3
    )
    assert found.residual == pytest.approx(residual, rel=1e-3)
    assert found.length == pytest.approx(best[2], abs=1e-3)
    assert found.family == pytest.approx(best[3], abs=1e-3)


def test_the_scale_and_the_likings_of_judges_are_found() -> None:
    """From one person a pair what shows is a / √(1 + π r² / 4), γ and δ likewise."""
    found = fit(drawn(2500, 0.3, -0.7, 0.5))
    shown = 1 / math.sqrt(1 + math.pi * found.residual / 4)
    assert found.scale * shown == pytest.approx(0.3, abs=0.03)
    assert found.length * shown == pytest.approx(-0.7, abs=0.15)
    assert found.family * shown == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(("variance", "seen"), [(6.0, 0.6), (1.5, 0.85), (3.0, 0.3)])
def test_several_people_on_a_pair_tell_chance_from_what_judges_miss(
    variance: float, seen: float
) -> None:
    found = fit(asked(2500, 3, variance, seen))
    # a² S + r² is all of people's variance, and a² S the part that judges see; S is 2.
    assert 2 * found.scale**2 + found.residual == pytest.approx(variance, rel=0.15)
    assert 2 * found.scale**2 == pytest.approx(variance * seen, rel=0.15)


def test_the_word_of_people_who_never_differ_weighs_more() -> None:
    """Sixty pairs with three people each: all of one mind, or two to one."""
    pairs = asked(60, 3, 2.0, 0.75)
    alike = fit([replace(x, won=float(x.won > 0.5)) for x in pairs])
    divided = fit([replace(x, won=2 / 3 if x.won > 0.5 else 1 / 3) for x in pairs])
    of = group("a", "b")
    said = [judged(of, 0, 1, 0.9), judged(of, 1, 0, 0.1)]
    left = []
    for calibration in (alike, divided):
        (before,) = rank([of], said, None, calibration)
        (after,) = rank([of], [*said, person(of, 0, 1, "second")], None, calibration)
        left.append((after.mean[0] - after.mean[1]) / (before.mean[0] - before.mean[1]))
    # One person against the judge, as a part of the judge's lead.
    assert left[0] < 0 < left[1]


def test_one_label_moves_the_map_a_little_and_the_first_fifty_no_more_than_they_tell() -> None:
    labels = asked(50, 1, 2.0, 2 / 3)
    # At v = 2 and c = 2: r² = 1 / (1/2 + 2/2), and a² S is the rest of v, with S = 2.
    expected = math.sqrt((2 - 2 / 3) / 2)
    assert fit(labels[:1]).scale == pytest.approx(expected, rel=0.1)
    for count in (10, 30, 50):
        assert fit(labels[:count]).scale == pytest.approx(expected, rel=0.35)


def test_no_labels_leave_the_judges_as_they_are() -> None:
    assert fit([]) == Calibration(1.0, 0.0, 0.0)


@settings(max_examples=15, deadline=None)
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


def test_of_a_judge_whom_people_do_not_follow_nearly_all_is_left_open() -> None:
    generator = np.random.default_rng(0)
    coins = [replace(x, won=float(generator.random() < 0.5)) for x in asked(400, 1, 2.0, 0.75)]
    found = fit(coins)
    seen = 2 * found.scale**2
    assert seen / (seen + found.residual) < 0.15
    assert np.abs(probabilities(coins, found) - 0.5).mean() < 0.1


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
    assert [label.people for label in found] == [3, 1]
    assert [label.weight for label in found] == [1.0, 1.0]


def test_who_judges_a_pair_twice_is_one_person() -> None:
    of = group("a", "b")
    (ranking,) = rank([of], [judged(of, 0, 1, 0.9)])
    people = [person(of, *pair, "first", "ann") for pair in ((0, 1), (0, 1), (1, 0))]
    candidates = {c.candidate_id: c for c in of.candidates}
    (label,) = labels_of(
        ranking, candidates, [*people, person(of, 0, 1, "second", "bob")], Families()
    )
    # Ann leans to the first by two to one, Bob to the second.
    assert label.people == 2
    assert label.won == pytest.approx((2 / 3 + 0) / 2)


def test_the_pairs_of_one_order_count_as_one_less_than_its_answers() -> None:
    of = group("a", "b", "c", "d")
    (ranking,) = rank([of], [judged(of, 0, 1, 0.9)])
    ids = tuple(c.candidate_id for c in of.candidates)
    order = Judgment("o", of.prompt.prompt_id, "human", "people", ids, scores=(4.0, 3.0, 2.0, 1.0))
    candidates = {c.candidate_id: c for c in of.candidates}
    found = list(labels_of(ranking, candidates, [order], Families()))
    assert len(found) == 6
    assert sum(label.weight for label in found) == pytest.approx(3)


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
    labels = drawn(100, scale)
    found, surprise = fit(labels), surprise_of(labels)
    spread = sum(x.spread for x in labels) / len(labels)
    seen = found.scale**2 * spread
    here = np.array(
        [
            math.log(seen + found.residual),
            math.log(2 / found.residual - 2 / (seen + found.residual)),
            found.length,
            found.family,
        ]
    )
    assert found.scale < 0.3
    for shift in 0.02 * np.concatenate([np.eye(4), -np.eye(4)]):
        assert surprise(here) < surprise(here + shift)


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
