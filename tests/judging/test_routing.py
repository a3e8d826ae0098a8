"""Which prompts people are asked about, and how sure judges have to be without them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import binom, chi2, norm

from judging.judge import Group
from judging.ranking import rank
from judging.routing import (
    DELTA,
    PeopleConfig,
    Standing,
    agreement_with,
    binomial_tail,
    choose,
    routes,
    standings,
    trusted,
)
from preferences.conversations import imported_candidate, make_prompt
from preferences.records import Judgment, Message, Ranking, Route, from_table, to_table
from preferences.store import Shard
from tests.judging.groups import group, judged


def config(**changes: Any) -> PeopleConfig:
    """Of a build that asks people."""
    return PeopleConfig(**{"labels": "labels.csv", "budget": 20, **changes})


def prompts(confidences: Sequence[float], regrets: Sequence[float] | None = None) -> list[Standing]:
    """A prompt for each confidence; regret is what is missing to certainty if none is given."""
    return [
        Standing(
            prompt_id=f"{n:04x}",
            best="best",
            worst="worst",
            confidence=p,
            rivals=("best", "second"),
            probability=0.5 + (p - 0.5) / 2,
            regret=1 - p if regrets is None else regrets[n],
            weight=1.0,
            texts=(("best",), ("second", "the same"), ("worst",)),
        )
        for n, p in enumerate(confidences)
    ]


def heard(
    known: Sequence[Standing], agreed: Mapping[str, bool], answered: Collection[str] = ()
) -> list[Standing]:
    """The same prompts after people have answered some questions."""
    return [
        dataclasses.replace(
            s,
            answered=s.prompt_id in answered or s.prompt_id in agreed,
            agreed=agreed.get(s.prompt_id),
        )
        for s in known
    ]


def ranked(
    count: int, seed: int = 0, categories: Sequence[str | None] = (None,)
) -> tuple[list[Group], list[Ranking]]:
    """Prompts of two to six answers, and rankings of any certainty."""
    random = np.random.default_rng(seed)
    groups, rankings = [], []
    for n in range(count):
        prompt = make_prompt(
            (Message("user", f"question {n}"),), "t:1", category=categories[n % len(categories)]
        )
        size = int(random.integers(2, 7))
        answers = tuple(imported_candidate(prompt, f"model {k}", f"{k}") for k in range(size))
        root = random.normal(0, 0.6, (size, size))
        covariance = root @ root.T + 0.05 * np.eye(size)
        groups.append(Group(prompt, answers))
        rankings.append(
            Ranking(
                prompt.prompt_id,
                tuple(c.candidate_id for c in answers),
                tuple(random.normal(0, 1.5, size).tolist()),
                tuple(covariance.ravel().tolist()),
                ("j",),
            )
        )
    return groups, rankings


@pytest.mark.parametrize("trials", [1, 14, 60, 500, 5000])
@pytest.mark.parametrize("probability", [0.55, 0.8, 0.99])
def test_the_binomial_tail_is_scipys(trials: int, probability: float) -> None:
    for least in {0, 1, trials // 2, int(trials * probability), trials, trials + 1}:
        expected = binom.sf(least - 1, trials, probability)
        assert binomial_tail(least, trials, probability) == pytest.approx(expected, rel=1e-9)


# What is asked


@settings(max_examples=200, deadline=None)
@given(
    confidences=st.lists(st.floats(0.5, 1), max_size=60),
    budget=st.integers(1, 50),
    share=st.floats(0, 1),
    keep=st.floats(0.5, 1),
    answering=st.randoms(use_true_random=False),
)
def test_the_budget_is_never_exceeded_however_people_answer(
    confidences: list[float], budget: int, share: float, keep: float, answering: Any
) -> None:
    known = prompts(confidences)
    wanted = config(budget=budget, calibration=share, keep=keep, target_agreement=0.6)
    asked: set[str] = set()
    agreed: dict[str, bool] = {}
    for _ in range(4):
        choice = choose(heard(known, agreed, asked), wanted)
        assert not choice.calibrate & choice.ask
        # Whoever has answered has spent of the budget, whatever is asked now.
        assert len(choice.calibrate | choice.ask | asked) <= budget
        assert asked <= choice.calibrate | choice.ask
        assert choice.answered == len(asked)
        decisions = Counter(r.decision for r in routes(known, choice, 2))
        assert decisions["calibrate"] == len(choice.calibrate) <= budget * share
        assert decisions["ask"] == len(choice.ask)
        for prompt_id in sorted(choice.calibrate | choice.ask):
            if answering.random() < 0.5:
                asked.add(prompt_id)
                agreed.setdefault(prompt_id, answering.random() < 0.8)


def test_the_random_slice_is_uniform_and_looks_at_no_number() -> None:
    # 2,000 seeds draw 10 of 40: each prompt 500 times, with the variance 2000 · ¼ · ¾ = 375, and
    # (since 10 are drawn without replacement) Σ (n - 500)² / 375 · 39/40 is χ² with 39 degrees.
    known = prompts(np.linspace(0.5, 1, 40).tolist())
    counts = Counter[str]()
    for seed in range(2000):
        counts.update(choose(known, config(calibration=0.5, seed=seed)).calibrate)
    assert sum(counts.values()) == 2000 * 10
    square = sum((counts[s.prompt_id] - 500) ** 2 for s in known) / 375 * 39 / 40
    assert 0.001 < chi2.sf(square, 39) < 0.999
    # The mean regret of what is drawn is that of all, within 3.3 standard errors.
    regrets = np.array([s.regret for s in known])
    drawn = np.array([counts[s.prompt_id] for s in known])
    error = math.sqrt(regrets.var() / 10 * (30 / 39) / 2000)
    assert abs((drawn @ regrets) / drawn.sum() - regrets.mean()) < 3.3 * error


def test_a_larger_budget_keeps_the_random_slice_that_was_asked() -> None:
    known = prompts([0.7] * 100)
    small, large = choose(known, config(budget=20)), choose(known, config(budget=40))
    assert (len(small.calibrate), len(large.calibrate)) == (10, 20)
    assert small.calibrate < large.calibrate


def test_the_rest_goes_where_an_answer_is_worth_most() -> None:
    regrets = [0.1 * n for n in range(30)]
    known = prompts([0.6] * 30, regrets)
    choice = choose(known, config(budget=6, calibration=0.5))
    others = [s.prompt_id for s in known if s.prompt_id not in choice.calibrate]
    assert choice.ask == set(others[-3:])
    assert Counter(r.decision for r in routes(known, choice, 2)) == {
        "calibrate": 3,
        "ask": 3,
        "over_budget": 24,
    }


def test_a_category_can_be_worth_more_or_nothing() -> None:
    known = [
        dataclasses.replace(s, weight=weight)
        for s, weight in zip(prompts([0.6] * 4, [0.4, 0.3, 0.2, 9.0]), [1, 1, 3, 0], strict=True)
    ]
    # 0.2 · 3 = 0.6 is more than 0.4, and 9 · 0 is nothing.
    choice = choose(known, config(budget=1, calibration=0))
    assert choice.ask == {"0002"}
    assert choose(known, config(budget=9, calibration=0)).ask == {"0000", "0001", "0002"}
    groups, rankings = ranked(3, categories=["code", None, "chat"])
    weights = [s.weight for s in standings(rankings, groups, {"code": 2.5, "chat": 0})]
    assert weights == [2.5, 1.0, 0.0]


def test_equals_are_asked_in_the_order_of_their_ids() -> None:
    known = prompts([0.6] * 10)
    for order in (known, known[::-1]):
        assert choose(order, config(budget=2, calibration=0)).ask == {"0000", "0001"}


def test_nobody_is_asked_by_worth_where_judges_are_sure() -> None:
    known = prompts([0.95] * 5 + [0.6])
    choice = choose(known, config(budget=6, calibration=0, keep=0.9))
    assert choice.ask == {"0005"}
    assert [r.decision for r in routes(known, choice, 2)] == ["keep"] * 5 + ["ask"]


def test_what_people_have_answered_stays_asked() -> None:
    known = prompts([0.95, 0.6, 0.6])
    choice = choose(heard(known, {}, {"0000"}), config(budget=2, calibration=0))
    assert choice.ask == {"0000", "0001"}


# Which pair


def test_the_slice_asks_about_best_and_worst_and_worth_about_the_two_that_may_be_best() -> None:
    of = group("one", "two", "three")
    ids = tuple(c.candidate_id for c in of.candidates)
    narrow = (0.1, 0, 0, 0, 0.1, 0, 0, 0, 0.1)
    [s] = standings([Ranking(of.prompt.prompt_id, ids, (-2.0, 1.0, 1.2), narrow, ("j",))], [of], {})
    assert (s.best, s.worst) == (ids[2], ids[0])
    assert s.rivals == (ids[2], ids[1])
    # MacKay: σ(m / √(1 + π · 0.2 / 8)) for m = 3.2 and 0.2.
    root = math.sqrt(1 + math.pi * 0.2 / 8)
    assert s.confidence == pytest.approx(1 / (1 + math.exp(-3.2 / root)))
    assert s.probability == pytest.approx(1 / (1 + math.exp(-0.2 / root)))
    # E max(0, d) for d ~ N(-0.2, 0.2); the third is out of the question.
    z = -0.2 / math.sqrt(0.2)
    assert s.regret == pytest.approx(-0.2 * norm.cdf(z) + math.sqrt(0.2) * norm.pdf(z), rel=0.1)
    asked = choose([s], config(budget=1, calibration=0))
    drawn = choose([s], config(budget=1, calibration=1))
    assert [(r.first_id, r.second_id, r.probability) for r in routes([s], drawn, 2)] == [
        (s.best, s.worst, s.confidence)
    ]
    assert asked.ask == set()  # P = 0.96 is sure enough; with 0.99 it would not be.
    unsure = choose([s], config(budget=1, calibration=0, keep=0.99))
    assert [(r.first_id, r.second_id, r.probability) for r in routes([s], unsure, 2)] == [
        (*s.rivals, s.probability)
    ]


def test_a_wide_outsider_can_be_a_rival_and_is_named_second() -> None:
    of = group("one", "two", "three")
    ids = tuple(c.candidate_id for c in of.candidates)
    wide = (0.01, 0, 0, 0, 0.01, 0, 0, 0, 25.0)
    [s] = standings([Ranking(of.prompt.prompt_id, ids, (1.0, 0.5, 0.0), wide, ("j",))], [of], {})
    assert s.rivals == (ids[0], ids[2])
    assert s.worst == ids[2]


def test_the_likelier_winner_of_two_rivals_stands_first() -> None:
    # The third is the best with P = 0.46, as the others share the rest; yet it is below the first
    # with P(N(-0.5, 25) < 0) = 0.54.
    of = group("one", "two", "three")
    ids = tuple(c.candidate_id for c in of.candidates)
    wide = (0.0025, 0, 0, 0, 0.0025, 0, 0, 0, 25.0)
    [s] = standings([Ranking(of.prompt.prompt_id, ids, (0.5, 0.45, 0.0), wide, ("j",))], [of], {})
    assert s.rivals == (ids[0], ids[2])
    assert s.probability > 0.5


def test_nobody_is_asked_to_tell_the_same_from_the_same() -> None:
    of = group("one", "two", " two ", "one")
    ids = tuple(c.candidate_id for c in of.candidates)
    diagonal = tuple((0.1 * np.eye(4)).ravel().tolist())
    ranking = Ranking(of.prompt.prompt_id, ids, (2.0, 0.0, 0.5, 1.9), diagonal, ("j",))
    [s] = standings([ranking], [of], {})
    assert s.rivals == (ids[0], ids[2])  # Not the fourth, which is the first again.
    assert (s.best, s.worst) == (ids[0], ids[1])
    same = group("one", "one\n", "one")
    assert list(standings(rank([same], [judged(same, 0, 1, 0.9)]), [same], {})) == []  # type: ignore[arg-type]


def test_lone_answers_and_prompts_without_judgments_are_never_routed() -> None:
    lone, unjudged, good = group("a"), group("b", "c", question="2"), group("d", "e", question="3")
    groups = [lone, unjudged, good]
    rankings = list(rank(groups, [judged(good, 0, 1, 0.8)]))
    assert [s.prompt_id for s in standings(rankings, groups, {})] == [good.prompt.prompt_id]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cut=st.sampled_from([1, 4, 64]),
    order=st.randoms(use_true_random=False),
)
def test_neither_order_nor_shards_change_a_route(seed: int, cut: int, order: Any) -> None:
    groups, rankings = ranked(60, seed, categories=["code", None])
    wanted = config(category_weights={"code": 2.0}, keep=0.97, budget=40, target_agreement=0.6)

    def routed(parts: list[tuple[list[Ranking], list[Group]]]) -> dict[str, Route]:
        def known() -> list[Standing]:
            found = [s for r, g in parts for s in standings(r, g, wanted.category_weights)]
            # With answers, and without.
            return heard(found, {s.prompt_id: s.regret < 0.2 for s in found if seed % 2})

        choice = choose(known(), wanted)
        return {r.prompt_id: r for r in routes(known(), choice, 2)}

    whole = routed([(rankings, groups)])
    places = list(range(60))
    order.shuffle(places)
    parts = []
    for shard in (Shard(index, cut) for index in range(cut)):
        mine = [n for n in places if rankings[n].prompt_id in shard]
        parts.append(([rankings[n] for n in mine], [groups[n] for n in mine[::-1]]))
    assert routed(parts) == whole
    assert {r.decision for r in whole.values()} > {"calibrate"}


def test_routes_come_back_from_parquet_as_they_were() -> None:
    known = prompts([0.95, 0.6])
    for choice in (
        choose(known, config(budget=1)),
        dataclasses.replace(
            choose(known, config()),
            trust=dataclasses.replace(choose(known, config()).trust, threshold=None),
        ),
    ):
        made = list(routes(known, choice, 2))
        assert from_table(Route, to_table(Route, made)) == made


# How sure is sure enough


def test_without_answers_the_recipes_number_counts_and_what_is_missing_is_said() -> None:
    trust = choose(prompts([0.95, 0.6]), config(keep=0.93)).trust
    assert (trust.threshold, trust.tested, trust.labels) == (0.93, False, 0)
    # 0.8^13 = 0.055 and 0.8^14 = 0.044.
    assert trust.lacking == (
        "0 answers on the random slice; 14 are the fewest that can show 80% agreement, "
        "and 42 make it likely"
    )


def test_thresholds_fall_until_one_fails() -> None:
    # 100 labels, the target 0.8: the first threshold keeps 42 of them, the last all. People agree
    # on the 60 surest and disagree on the rest: of n above, 60 agree, and P(Bin(67, 0.8) ≥ 60) =
    # 0.029, P(Bin(68, 0.8) ≥ 60) = 0.055 (scipy). So the threshold is the last of the sequence that
    # keeps 67 or fewer.
    assert binom.sf(59, 67, 0.8) < DELTA < binom.sf(59, 68, 0.8)
    confidences = np.linspace(1, 0.5, 100).tolist()
    labels = [(p, n < 60) for n, p in enumerate(confidences)]
    kept = [math.ceil((0.42 + 0.58 * step / 19) * 100) for step in range(20)]
    last = max(n for n in kept if n <= 67)
    trust = trusted(confidences, labels, config())
    assert trust.tested
    assert trust.threshold == confidences[last - 1]
    assert (trust.labels, trust.agreed, trust.lacking) == (100, 60, None)


def test_a_threshold_that_fails_ends_it_though_a_later_one_would_pass() -> None:
    # Wrong on the surest 20, right on the other 180: of all 200 it is right on 90 %, which would
    # show 80 %; but of the surest 42 on 22.
    confidences = np.linspace(1, 0.5, 200).tolist()
    labels = [(p, n >= 20) for n, p in enumerate(confidences)]
    assert binom.sf(179, 200, 0.8) < DELTA < binom.sf(21, 42, 0.8)
    trust = trusted(confidences, labels, config())
    assert trust.threshold is None
    assert trust.lacking is not None
    assert trust.lacking.startswith("people agree with the judges on 22 of 42 prompts")


def test_nobody_is_kept_where_people_show_that_judges_cannot_be_trusted() -> None:
    known = prompts(np.linspace(0.5, 0.99, 300).tolist())
    wanted = config(budget=200, calibration=0.5)
    coin = np.random.default_rng(0).random(300) < 0.5
    drawn = choose(known, wanted).calibrate
    agreed = {s.prompt_id: bool(c) for s, c in zip(known, coin, strict=True)}
    choice = choose(heard(known, {p: agreed[p] for p in drawn}), wanted)
    assert (choice.trust.labels, choice.trust.threshold) == (100, None)
    assert Counter(r.decision for r in routes(known, choice, 2)) == {
        "calibrate": 100,
        "ask": 100,
        "over_budget": 100,
    }


def test_only_answers_on_the_random_slice_measure_the_judges() -> None:
    known = prompts(np.linspace(0.5, 1, 200).tolist())
    wanted = config(budget=100, calibration=0.5)
    drawn = choose(known, wanted).calibrate
    agreed = {s.prompt_id: s.prompt_id in drawn for s in known}
    trust = choose(heard(known, agreed), wanted).trust
    assert (trust.labels, trust.agreed) == (50, 50)


@pytest.mark.parametrize(
    "judge", ["honest", "too sure", "not the surer the better", "below the target everywhere"]
)
def test_agreement_above_the_threshold_is_rarely_below_the_target(judge: str) -> None:
    # 1,000 draws: below the target in 5 %, and 3 standard deviations of √(0.05 · 0.95 / 1000).
    random = np.random.default_rng(7)
    wanted = config(target_agreement=0.8)
    missed = found = 0
    for _ in range(1000):
        size = int(random.choice([60, 150, 400]))
        sure = 1 / (1 + np.exp(-np.abs(random.normal(0, 1.6, 1500))))
        true = {
            "honest": sure,
            "too sure": 0.5 + 0.8 * (sure - 0.5),
            "not the surer the better": 0.84 + 0.12 * np.sin(12 * sure),
            "below the target everywhere": np.full(1500, 0.7999),
        }[judge]
        slice_ = random.choice(1500, size, replace=False)
        agrees = random.random(size) < true[slice_]
        falling = np.sort(sure)[::-1].tolist()
        labels = list(zip(sure[slice_].tolist(), agrees.tolist(), strict=True))
        threshold = trusted(falling, labels, wanted).threshold
        if threshold is not None:
            found += 1
            missed += bool(true[sure >= threshold].mean() < 0.8)
    assert found > 20  # Or the test would show nothing.
    assert missed / 1000 <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 1000)


def person(of: Group, first: int, second: int, verdict: str, annotator: str) -> Judgment:
    said = dataclasses.replace(judged(of, first, second, None), kind="human", judge="people")
    return dataclasses.replace(said, verdict=verdict, annotator=annotator)  # type: ignore[arg-type]


def test_people_agree_where_most_of_them_prefer_the_judges_best() -> None:
    of = group("good", "bad", "other")
    ids = [c.candidate_id for c in of.candidates]
    s = dataclasses.replace(prompts([0.9])[0], best=ids[0], worst=ids[1])
    yes, no = person(of, 1, 0, "second", "ann"), person(of, 0, 1, "second", "bob")
    tie = person(of, 0, 1, "tie", "cem")
    assert agreement_with(s, []) is None
    assert agreement_with(s, [person(of, 0, 2, "first", "ann")]) is None  # About another pair.
    assert agreement_with(s, [yes]) is True
    assert agreement_with(s, [no]) is False
    assert agreement_with(s, [tie]) is False
    assert agreement_with(s, [yes, no]) is False
    assert agreement_with(s, [yes, no, dataclasses.replace(yes, annotator="dan")]) is True


def test_what_people_said_stands_beside_the_judges_numbers_and_changes_none() -> None:
    of, other = group("good", "bad", "other"), group("good", "bad", question="2")
    ranking = [r for g in (of, other) for r in rank([g], [judged(g, 0, 1, 0.9)])]
    [quiet, silent] = standings(ranking, [of, other], {})
    answers = {of.prompt.prompt_id: [person(of, 0, 1, "first", "ann")]}
    [spoken, untouched] = standings(ranking, [of, other], {}, answers)
    assert untouched == silent
    assert spoken == dataclasses.replace(quiet, answered=True, agreed=True)


def test_a_recipe_asks_for_what_can_be_had() -> None:
    for wrong in ({"budget": 0}, {"calibration": 1.1}, {"target_agreement": 1.0}, {"keep": 0.4}):
        with pytest.raises(ValidationError):
            config(**wrong)
    with pytest.raises(ValidationError):
        config(category_weights={"code": -1})
    with pytest.raises(ValidationError):
        config(category_weights={"code": math.nan})


def test_people_rank_the_pair_with_the_likelier_best_that_say_something_else() -> None:
    [s] = prompts([0.9])
    s = dataclasses.replace(
        s,
        rivals=("b", "d"),
        # b and c say the same, so nobody has to read c; a is likelier the best than e.
        texts=(("b", "c"), ("a",), ("d",), ("e", "f")),
    )
    choice = choose([s], config(calibration=0, keep=0.999))
    shown = {
        n: [(r.first_id, r.second_id, *r.others) for r in routes([s], choice, n)]
        for n in (2, 3, 4, 6)
    }
    assert shown == {
        2: [("b", "d")],
        3: [("b", "d", "a")],
        4: [("b", "d", "a", "e")],
        6: [("b", "d", "a", "e")],
    }
