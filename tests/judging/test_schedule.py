"""Which comparisons to ask a judge for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judging.judge import Comparison, Group
from judging.noise import JudgeNoise, Noise
from judging.ranking import rank
from judging.schedule import (
    Guide,
    Rounds,
    adaptive,
    all_pairs,
    all_pairs_both_orders,
    knockout,
    learn_guide,
)
from preferences.records import Judgment
from tests.judging.groups import group

Say = Callable[[Comparison], float | None]
"""The log-odds a judge gives the first, or None where it cannot be read."""


def judge(shown: Comparison, say: Say) -> Judgment:
    ids = (shown.first.candidate_id, shown.second.candidate_id)
    blank = Judgment("-".join(ids), shown.prompt.prompt_id, "pairwise", "j", ids)
    said = say(shown)
    if said is None:
        return replace(blank, failure="no verdict in reply")
    return replace(blank, probability=1 / (1 + math.exp(-said)))


def carry_out(rounds: Rounds, say: Say) -> list[list[Comparison]]:
    """All rounds of a schedule."""
    asked = []
    try:
        comparisons = next(rounds)
        while True:
            asked.append(comparisons)
            comparisons = rounds.send([judge(shown, say) for shown in comparisons])
    except StopIteration:
        return asked


def by_index(strength: float = 1.0) -> Say:
    """A judge without noise: `model 0` is best, each next one `strength` logits worse."""

    def say(shown: Comparison) -> float:
        return strength * (number(shown.second.model) - number(shown.first.model))

    return say


def number(model: str) -> int:
    return int(model.removeprefix("model "))


def letters(of: Sequence[list[Comparison]]) -> list[tuple[str, str]]:
    return [(c.first.response, c.second.response) for round_ in of for c in round_]


SIX = group(*"abcdef")


def test_all_pairs_asks_every_pair_in_both_orders_at_once() -> None:
    asked = carry_out(all_pairs([group(*"abc")]), by_index())
    assert len(asked) == 1
    assert sorted(letters(asked)) == [
        (one, other) for one in "abc" for other in "abc" if one != other
    ]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_a_knockout_of_k_asks_twice_k_less_one_and_the_best_meets_all_it_needs(size: int) -> None:
    of = group(*"abcdefg"[:size])
    asked = letters(carry_out(knockout([of]), by_index()))
    assert len(asked) == 2 * (size - 1)
    lost = {max(pair) for pair in asked}
    assert lost == set("abcdefg"[1:size])
    assert {(two, one) for one, two in asked} == set(asked)


def test_the_first_round_pairs_the_candidates_off() -> None:
    first = carry_out(adaptive([SIX], Guide()), by_index())[0]
    assert sorted(c.response for shown in first for c in (shown.first, shown.second)) == list(
        "abcdef"
    )


def test_groups_of_two_are_asked_in_both_orders_and_of_one_not_at_all() -> None:
    groups = [group("a", "b"), group("alone", question="Two?"), group(question="None?")]
    assert letters(carry_out(adaptive(groups, Guide()), by_index())) == [("a", "b"), ("b", "a")]
    assert carry_out(adaptive([groups[1]], Guide()), by_index()) == []
    assert carry_out(adaptive([], Guide()), by_index()) == []


SPARE = Guide(Noise({"j": JudgeNoise(variance=0.3)}, 0.05, 4.0), True, "j")


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 7), st.floats(0.0, 2.0), st.floats(-3, 3), st.integers(0, 10**6))
def test_no_comparison_is_asked_twice_and_best_and_worst_have_met_in_both_orders(
    size: int, strength: float, bias: float, seed: int
) -> None:
    of = group(*"abcdefg"[:size], question=f"q{seed}")
    exact = by_index(strength)
    said: list[Judgment] = []

    def say(shown: Comparison) -> float:
        lead = exact(shown)
        assert lead is not None
        value = lead + bias
        said.append(judge(shown, lambda _: value))
        return value

    asked = letters(carry_out(adaptive([of], SPARE), say))
    assert max(Counter(asked).values()) == 1
    (ranking,) = rank([of], said, SPARE.noise)
    best = max(range(size), key=lambda n: ranking.mean[n])
    worst = min(range(size - 1, -1, -1), key=lambda n: ranking.mean[n])
    pair = of.candidates[best].response, of.candidates[worst].response
    assert {pair, pair[::-1]} <= set(asked)


def test_an_exact_judge_is_asked_little_and_the_best_and_the_worst_are_found() -> None:
    groups = [group(*"abcdef", question=f"q{n}") for n in range(40)]
    asked = carry_out(adaptive(groups, SPARE), by_index(1.3))
    assert sum(map(len, asked)) < 40 * 12
    said = [judge(shown, by_index(1.3)) for round_ in asked for shown in round_]
    rankings = list(rank(groups, said, SPARE.noise))
    assert all(r.mean.index(max(r.mean)) == 0 for r in rankings)
    assert all(r.mean.index(min(r.mean)) == 5 for r in rankings)


def test_what_is_asked_of_a_group_does_not_depend_on_the_others() -> None:
    groups = [group(*"abcdef"[: 2 + n % 5], question=f"q{n}") for n in range(15)]

    def say(shown: Comparison) -> float:
        return math.sin(number(shown.first.model) * 7 + number(shown.second.model) * 3) * 2

    together = carry_out(adaptive(groups, SPARE), say)
    for of in groups:
        alone = carry_out(adaptive([of], SPARE), say)
        mine = [
            (c.first.response, c.second.response)
            for round_ in together
            for c in round_
            if c.prompt.prompt_id == of.prompt.prompt_id
        ]
        assert mine == letters(alone)


def test_a_judge_that_cannot_be_read_is_not_asked_for_ever() -> None:
    asked = letters(carry_out(adaptive([SIX], Guide()), lambda _: None))
    assert len(asked) == len(set(asked)) <= 30


def test_cyclic_preferences_come_to_an_end() -> None:
    def say(shown: Comparison) -> float:
        step = (number(shown.second.model) - number(shown.first.model)) % 3
        return {1: 2.0, 2: -2.0}[step]

    asked = letters(carry_out(adaptive([group(*"abc")], Guide()), say))
    assert len(asked) == len(set(asked)) <= 6


def test_a_reward_model_that_knows_already_leaves_less_to_ask() -> None:
    known = [
        Judgment(f"s{n}", SIX.prompt.prompt_id, "reward_model", "rm", (c.candidate_id,),
                 scores=(-4.0 * n,))
        for n, c in enumerate(SIX.candidates)
    ]  # fmt: skip
    noise = {**SPARE.noise.judges, "rm": JudgeNoise(scale=4.0, variance=0.5)}
    guide = replace(SPARE, noise=replace(SPARE.noise, judges=noise))
    asked = letters(carry_out(adaptive([SIX], guide, known=known), by_index()))
    assert {("a", "f"), ("f", "a")} <= set(asked)
    assert len(asked) < len(letters(carry_out(adaptive([SIX], SPARE), by_index())))


def test_finding_the_best_alone_asks_less() -> None:
    groups = [group(*"abcdef", question=f"q{n}") for n in range(20)]
    both = carry_out(adaptive(groups, SPARE, worst=1.0), by_index(0.7))
    best = carry_out(adaptive(groups, SPARE, worst=0.0), by_index(0.7))
    assert sum(map(len, best)) < sum(map(len, both))


def test_a_guide_is_learnt_from_a_pilot() -> None:
    groups = [group(*"abcd", question=f"q{n}") for n in range(30)]
    shown = [c for of in groups for c in all_pairs_both_orders(of)]

    def say(comparison: Comparison) -> float:
        lead = by_index(1.5)(comparison)
        assert lead is not None
        return lead + 0.9

    soft = learn_guide(groups, [judge(c, say) for c in shown], "j")
    assert soft.is_soft
    assert soft.noise.of("j").bias == pytest.approx(0.9, abs=0.1)
    # A judge without noise: what is left is what the defaults put there.
    assert soft.reply_variance < 0.2
    outright = [
        replace(judge(c, say), probability=None, verdict="first" if say(c) > 0 else "second")
        for c in shown
    ]
    assert not learn_guide(groups, outright, "j").is_soft


def test_a_group_keeps_its_candidates_in_comparisons() -> None:
    of: Group = group(*"abcd")
    for round_ in carry_out(adaptive([of], Guide()), by_index()):
        for shown in round_:
            assert shown.prompt is of.prompt
            assert shown.first in of.candidates
            assert shown.second in of.candidates
