"""Which pairs a policy proposes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from preferences.assembly import assemble
from preferences.lint import contradictory_pairs, duplicate_pairs, equal_answers
from preferences.pair_table import pair_table
from preferences.policies import POLICIES, PairsConfig, Standings
from preferences.records import Candidate, Dropped, Preference, Ranking
from preferences.text_pairs import TextPair

MODELS = ("strong", "middle", "weak")


def configured(policy: str, least: float = 0.6) -> PairsConfig:
    models = MODELS if policy == "delta" else ()
    return PairsConfig(policy=policy, models=models, min_probability=least)  # type: ignore[arg-type]


def standings(
    means: Sequence[float],
    lengths: Sequence[int] | None = None,
    models: Sequence[str] | None = None,
    doubt: Sequence[float] | None = None,
) -> Standings:
    """P(one beats another) is σ of the difference of means, each divided by (1 + its doubt)."""
    size = len(means)
    lengths, models = lengths or [10] * size, models or ["m"] * size
    shares = doubt or [0.0] * size

    def probability(one: int, other: int) -> float:
        difference = (means[one] - means[other]) / (1 + shares[one] + shares[other])
        return 1 / (1 + math.exp(-difference))

    candidates = tuple(
        Candidate(f"c{n}", "p", models[n], "x" * lengths[n], "complete") for n in range(size)
    )
    return Standings("p", candidates, tuple(means), probability)


def proposed(policy: str, of: Standings, least: float = 0.6) -> list[tuple[int, int]]:
    return list(POLICIES[policy](of, configured(policy, least)))


def test_top_two_is_the_best_against_the_second() -> None:
    assert proposed("top_two", standings([3, 2, 1])) == [(0, 1)]


def test_max_min_passes_over_the_lowest_if_it_may_not_be_the_worse() -> None:
    # The last one's mean is lowest, but little is known of it: σ(4 / 11) = 0.59.
    of = standings([2, 1, 0, -2], doubt=[0, 0, 0, 10])
    assert proposed("max_min", of) == [(0, 2)]
    assert proposed("best_worst", of) == [(0, 3)]


def test_max_min_proposes_nothing_where_the_best_surely_beats_nobody() -> None:
    # σ(0.2) = 0.55.
    assert proposed("max_min", standings([0.2, 0.1, 0])) == []


def test_two_sigma_rejects_the_one_nearest_to_two_deviations_below_the_mean() -> None:
    # Nine means: μ = (4 + 3 + 3 + 3 + 3 + 3 + 2 + 1 - 4) / 9 = 2. Squares of the differences:
    # 4 + 5·1 + 0 + 1 + 36 = 46, σ = √(46 / 9) = 2.26, so μ - 2σ = -2.52; -4 is 1.48 away.
    means = [4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 1.0, -4.0]
    assert proposed("two_sigma", standings(means)) == [(0, 8)]
    # A far outlier and one below the others: μ = (10·3 + 0 - 20) / 12 = 0.8333; squares: 10·4.694 +
    # 0.694 + 434.0 = 481.7; σ = √40.14 = 6.336; μ - 2σ = -11.84: -20 is 8.16 away and 0 is 11.84.
    assert proposed("two_sigma", standings([3.0] * 10 + [0.0, -20.0])) == [(0, 11)]
    # With -7 in the place of 0, μ = 0.25 and σ = √((10·7.5625 + 52.5625 + 410.0625) / 12) = 6.698;
    # μ - 2σ = -13.15: -7 is 6.15 away and -20 is 6.85, so the outlier is not taken.
    assert proposed("two_sigma", standings([3.0] * 10 + [-7.0, -20.0])) == [(0, 10)]


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=5))
def test_with_five_candidates_or_fewer_two_sigma_is_best_worst(means: list[float]) -> None:
    # Samuelson's inequality: no value is further below the mean than σ·√(K - 1), here 2σ.
    of = standings(sorted(means, reverse=True))
    ((chosen, rejected),) = proposed("two_sigma", of)
    assert chosen == 0
    assert of.means[rejected] == pytest.approx(of.means[-1], abs=1e-9)


def test_length_matched_takes_the_sure_pair_of_the_most_equal_lengths() -> None:
    # Ratios: 200/100 = 2, 100/90 = 1.11, 200/90 = 2.2, and 99/100 of an unsure pair, σ(0.1) = 0.52.
    of = standings([2, 1, 0, -0.1], lengths=[200, 100, 90, 91])
    assert proposed("length_matched", of) == [(1, 3)]  # 100/91 = 1.10
    assert proposed("length_matched", of, least=0.7) == [(1, 3)]  # σ(1.1) = 0.75
    # σ(2) = 0.88: of (0, 2) and (0, 3), σ(2.1) = 0.89, the second has the ratio 2.20 against 2.22.
    assert proposed("length_matched", of, least=0.85) == [(0, 3)]


def test_of_equally_matched_pairs_the_best_answers_are_taken() -> None:
    assert proposed("length_matched", standings([3, 2, 1])) == [(0, 1)]


def test_a_pair_of_equal_lengths_counts_the_ratio_and_not_the_difference() -> None:
    # 1000 and 900 differ by 100 characters and 11 %, 20 and 10 by 10 characters and 100 %.
    of = standings([9, 6, 3, 0], lengths=[1000, 10, 900, 20])
    assert proposed("length_matched", of) == [(0, 2)]


def test_delta_prefers_every_answer_of_a_stronger_model_whatever_its_mean() -> None:
    of = standings([3, 2, 1, 0], models=["weak", "strong", "stranger", "strong"])
    assert proposed("delta", of) == [(1, 0), (3, 0)]


def test_delta_pairs_no_two_answers_of_one_model() -> None:
    assert proposed("delta", standings([3, 2, 1], models=["weak", "weak", "stranger"])) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "delta"}, "delta needs two `models`"),
        ({"policy": "delta", "models": ["a"]}, "delta needs two `models`"),
        ({"policy": "delta", "models": ["a", "b", "a"]}, "a model stands twice"),
        ({"policy": "top_two", "models": ["a", "b"]}, "top_two looks at no `models`"),
    ],
)
def test_models_are_named_for_delta_and_for_nothing_else(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        PairsConfig.model_validate(values)


# What holds for all policies, through assembly.

ANSWERS = st.lists(
    st.tuples(st.integers(-6, 6), st.integers(1, 40), st.sampled_from((*MODELS, "stranger"))),
    min_size=2,
    max_size=8,
)
POLICY = st.sampled_from(sorted(POLICIES))
LEAST = st.floats(0.5, 0.95)


def rows(answers: Sequence[tuple[int, int, str]]) -> list[tuple[float, Candidate]]:
    """Means in halves, and answers of which no two are alike."""
    return [
        (mean / 2, Candidate(f"c{n}", "p", model, chr(97 + n) * length, "complete"))
        for n, (mean, length, model) in enumerate(answers)
    ]


def assembled(
    of: Sequence[tuple[float, Candidate]], policy: str, least: float
) -> list[Preference | Dropped]:
    means, candidates = zip(*of, strict=True)
    ids = tuple(c.candidate_id for c in candidates)
    ranking = Ranking("p", ids, means, (0.0,) * len(ids) ** 2, ("j",))

    def probability(ranking: Ranking, one: int, other: int) -> float:
        return 1 / (1 + math.exp(ranking.mean[other] - ranking.mean[one]))

    by_id = {c.candidate_id: c for c in candidates}
    return list(assemble([ranking], by_id, configured(policy, least), probability))


@settings(max_examples=200, deadline=None)
@given(ANSWERS, POLICY, LEAST)
def test_no_policy_proposes_a_pair_twice_or_an_answer_against_itself(
    answers: list[tuple[int, int, str]], policy: str, least: float
) -> None:
    means, lengths, models = zip(*sorted(answers, reverse=True), strict=True)
    pairs = proposed(policy, standings(means, lengths, models), least)
    assert not [n for n in Counter(frozenset(pair) for pair in pairs).values() if n > 1]
    assert all(one != other for one, other in pairs)
    assert all(0 <= place < len(means) for pair in pairs for place in pair)
    if policy != "delta":
        assert all(means[one] >= means[other] for one, other in pairs)


@settings(max_examples=200, deadline=None)
@given(ANSWERS, POLICY, LEAST)
def test_a_preference_is_never_for_the_worse_nor_below_the_minimum(
    answers: list[tuple[int, int, str]], policy: str, least: float
) -> None:
    of = rows(answers)
    means = {c.candidate_id: mean for mean, c in of}
    found = assembled(of, policy, least)
    assert found  # a prompt makes a pair, or a drop that says why not
    for record in found:
        if isinstance(record, Preference):
            assert record.margin == means[record.chosen_id] - means[record.rejected_id] > 0
            assert record.probability >= least


@settings(max_examples=200, deadline=None)
@given(ANSWERS, POLICY, LEAST, st.randoms())
def test_the_order_in_which_candidates_are_ranked_changes_nothing(
    answers: list[tuple[int, int, str]], policy: str, least: float, draw: Random
) -> None:
    of = rows(answers)
    shuffled = draw.sample(of, len(of))
    assert assembled(shuffled, policy, least) == assembled(of, policy, least)


@settings(max_examples=200, deadline=None)
@given(ANSWERS, POLICY, LEAST)
def test_what_is_assembled_holds_no_copy_and_no_contradiction(
    answers: list[tuple[int, int, str]], policy: str, least: float
) -> None:
    # Four texts for up to eight answers: models repeat themselves.
    texts = ("Yes, of course.", "No.", "Perhaps tomorrow morning", "ask somebody else")
    of = [
        (mean, dataclasses.replace(candidate, response=texts[length % 4]))
        for (mean, candidate), (_, length, _) in zip(rows(answers), answers, strict=True)
    ]
    said = {c.candidate_id: c.response for _, c in of}
    kept = [r for r in assembled(of, policy, least) if isinstance(r, Preference)]
    table = pair_table(
        TextPair(r.preference_id, "train", "Why?", said[r.chosen_id], said[r.rejected_id])
        for r in kept
    )
    for rule in (equal_answers, contradictory_pairs, duplicate_pairs):
        assert rule(table) is None


def test_a_prompt_without_a_fitting_pair_is_dropped_with_the_policys_name() -> None:
    (found,) = assembled(rows([(1, 5, "weak"), (0, 5, "weak")]), "delta", 0.6)
    assert isinstance(found, Dropped)
    assert (found.record_id, found.reason, found.detail) == ("p", "no_fitting_pair", "delta")


def test_a_pair_of_delta_that_the_judges_contradict_is_dropped() -> None:
    # The strong model's answer has the lower mean: σ(-2) = 0.119.
    (found,) = assembled(rows([(4, 5, "weak"), (0, 5, "strong")]), "delta", 0.6)
    assert isinstance(found, Dropped)
    assert (found.reason, found.detail) == ("probability_below_minimum", "0.119")
