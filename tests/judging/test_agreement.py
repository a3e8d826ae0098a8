"""How judges judged, and how far they agree with each other and with people."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judging.agreement import (
    Agreement,
    Between,
    RaterFacts,
    Reliability,
    agreement,
    judge_facts,
)
from judging.judge import Group
from judging.raters import family_of
from preferences.records import Judgment
from tests.judging.groups import group, judged

VERDICTS = ("first", "second", "tie", None)


def by(judge: str, of: Group, first: int, second: int, said: Any, **other: Any) -> Judgment:
    """A judgment by this judge: a probability or an outright verdict."""
    probability, verdict = (None, said) if isinstance(said, str) else (said, None)
    judgment = judged(of, first, second, probability, verdict=verdict)
    return dataclasses.replace(judgment, judge=judge, **other)


def person(name: str, of: Group, first: int, second: int, verdict: str) -> Judgment:
    """A verdict of a person."""
    return by("labelling", of, first, second, verdict, kind="human", annotator=name)


def failed(judge: str, of: Group, first: int, second: int) -> Judgment:
    """A judgment that could not be read."""
    return by(judge, of, first, second, None, failure="no verdict in reply")


def scored(judge: str, of: Group, *scores: float, kind: str = "pointwise") -> list[Judgment]:
    """Scores of single answers, in the order of the group."""
    return [
        Judgment(
            judgment_id=f"{judge}-{candidate.candidate_id}",
            prompt_id=of.prompt.prompt_id,
            kind=kind,  # type: ignore[arg-type]
            judge=judge,
            candidate_ids=(candidate.candidate_id,),
            scores=(score,),
        )
        for candidate, score in zip(of.candidates, scores, strict=True)
    ]


def in_category(of: Group, category: str | None) -> Group:
    """The same group, its prompt in a category."""
    return Group(dataclasses.replace(of.prompt, category=category), of.candidates)


def by_models(of: Group, *models: str) -> Group:
    """The same answers by other models."""
    named = zip(of.candidates, models, strict=True)
    return Group(of.prompt, tuple(dataclasses.replace(c, model=m) for c, m in named))


def rater(found: Agreement, name: str, category: str | None = None) -> RaterFacts:
    """The facts of one rater."""
    (facts,) = (r for r in found.raters if (r.rater, r.category) == (name, category))
    return facts


def between(found: Agreement, one: str, other: str, category: str | None = None) -> Between:
    """The agreement of two sides."""
    sides = (one, other, category)
    (record,) = (b for b in found.between if (b.one, b.other, b.category) == sides)
    return record


def among(found: Agreement, raters: str, category: str | None = None) -> Reliability:
    """The reliability of several raters."""
    (record,) = (r for r in found.reliability if (r.raters, r.category) == (raters, category))
    return record


def test_what_a_judge_cost_and_failed_at_is_counted() -> None:
    of = group("a", "b")
    judgments = [
        by("j", of, 0, 1, 0.9, prompt_tokens=10, completion_tokens=1, cost=0.5),
        by("j", of, 1, 0, None, failure="no verdict in reply", prompt_tokens=7),
    ]
    facts = judge_facts(judgments)
    assert (facts.judgments, facts.failures) == (2, {"no verdict in reply": 1})
    assert (facts.prompt_tokens, facts.completion_tokens, facts.cost) == (17, 1, 0.5)
    assert judge_facts([]).judgments == 0


def test_the_habits_of_a_judge_are_counted_by_hand() -> None:
    one = group("a", "bb", "ccc", question="q1")
    two = group("aaaa", "b", question="q2")
    on_one = [
        by("j", one, 0, 1, 0.9),  # prefers a, shown first
        by("j", one, 1, 0, 0.2),  # prefers a again: consistent
        by("j", one, 0, 2, 0.7),  # prefers a, shown first
        by("j", one, 2, 0, 0.6),  # prefers c, shown first: not consistent; a by 0.55 in the mean
        by("j", one, 1, 2, 0.5),  # a tie
        by("j", one, 2, 1, "tie"),  # a tie again: consistent
    ]
    on_two = [by("j", two, 0, 1, "second"), failed("j", two, 1, 0)]
    facts = rater(agreement([(one, on_one), (two, on_two)]), "j")
    assert (facts.judgments, facts.pairs, facts.unusable, facts.human) == (8, 4, 0, False)
    assert facts.missing == pytest.approx(1 / 8)
    # First preferred, of the seven read: 1 + 0 + 1 + 1 + 0.5 + 0.5 + 0 = 4.
    assert facts.first_rate == pytest.approx(4 / 7)
    # Read in both orders: three pairs, of which two agree.
    assert facts.consistency == pytest.approx(2 / 3)
    # Longer preferred, of the four pairs: a over bb no, a over ccc no, bb and ccc tie, b over aaaa
    # no: 0.5 of 4.
    assert facts.longer_wins == pytest.approx(0.5 / 4)


def test_a_judge_that_always_takes_the_first_ties_and_is_never_consistent() -> None:
    of = group("a", "b")
    judgments = [by("j", of, 0, 1, 0.8), by("j", of, 1, 0, 0.8)]
    judgments += [by("k", of, 0, 1, "tie")]
    found = agreement([(of, judgments)])
    assert (rater(found, "j").first_rate, rater(found, "j").consistency) == (1.0, 0.0)
    # 0.8 and 1 - 0.8 cancel out, so it agrees with the one that called a tie.
    assert between(found, "j", "k").agreement.value == 1.0


def test_a_list_was_read_in_its_order_and_single_scores_in_none() -> None:
    of = group("a", "b", "c")
    a, b, c = (candidate.candidate_id for candidate in of.candidates)
    listed = Judgment("l", of.prompt.prompt_id, "listwise", "l", (c, a, b), scores=(-1, -2, -2))
    turned = Judgment("t", of.prompt.prompt_id, "listwise", "l", (b, a, c), scores=(-3, -1, -2))
    found = agreement([(of, [listed, turned, *scored("s", of, 3, 2, 2)])])
    facts = rater(found, "l")
    # c-a, c-b: the earlier won; a-b: a tie. Turned: b-a, b-c: the later won; a-c: the earlier.
    # First preferred: (1 + 1 + 0.5 + 0 + 0 + 1) / 6.
    assert facts.first_rate == pytest.approx(3.5 / 6)
    # c over b both times; a and c turned around, a and b a tie once: one of three.
    assert facts.consistency == pytest.approx(1 / 3)
    assert (facts.pairs, facts.longer_wins) == (3, None)
    by_scores = rater(found, "s")
    assert (by_scores.pairs, by_scores.first_rate, by_scores.consistency) == (3, None, None)
    # The list: a and c tie (lost and won), c over b, a over b by 0.75. Scores: a over both, b and
    # c tie. The same on a over b alone.
    record = between(found, "l", "s")
    assert (record.pairs, record.agreement.value) == (3, pytest.approx(1 / 3))


def test_equal_scores_are_a_tie_and_an_answer_scored_twice_counts_by_its_mean() -> None:
    of = group("a", "b")
    twice = scored("s", of, 4, 2) + scored("s", of, 2, 4)
    found = agreement([(of, [*twice, by("j", of, 0, 1, "tie")])])
    assert between(found, "j", "s").agreement.value == 1.0


def test_scores_of_different_kinds_are_not_compared() -> None:
    of = group("a", "b")
    (first, _), (_, second) = scored("s", of, 4, 2), scored("s", of, 4, 2, kind="reward_model")
    assert rater(agreement([(of, [first, second])]), "s").pairs == 0


def test_each_annotator_is_a_rater_and_all_are_one_side_against_the_judges() -> None:
    one, two = group("a", "b", question="q1"), group("a", "b", question="q2")
    on_one = [
        by("j", one, 0, 1, "first"),
        person("ann", one, 0, 1, "first"),
        person("ben", one, 1, 0, "second"),
    ]
    on_two = [by("j", two, 0, 1, "second"), person("ann", two, 0, 1, "first")]
    found = agreement([(one, on_one), (two, on_two)])
    assert [r.rater for r in found.raters] == ["j", "labelling/ann", "labelling/ben"]
    assert [r.human for r in found.raters] == [False, True, True]
    # j against ann and ben on q1: the same twice; against ann on q2: not.
    sides = between(found, "human annotators", "j")
    assert (sides.pairs, sides.agreement.value) == (3, pytest.approx(2 / 3))
    people = between(found, "human annotators", "human annotators")
    assert (people.pairs, people.agreement.value) == (1, 1.0)
    assert people.kappa.missing == "only one verdict occurs"
    # Only q1 was judged by two people. All three raters' five verdicts are on both pairs.
    assert among(found, "human annotators").pairs == 1
    assert among(found, "judges and people").pairs == 2
    assert not [r for r in found.reliability if r.raters == "all judges"]


@pytest.mark.parametrize(
    ("kind", "human"), [("human", True), ("human_rank", True), ("imported", False)]
)
def test_a_person_is_told_by_the_kind_of_judgment(kind: str, human: bool) -> None:
    of = group("a", "b")
    found = agreement([(of, [by("someone", of, 0, 1, "first", kind=kind)])])
    assert rater(found, "someone").human is human


def test_verdicts_are_tables_of_counts_whatever_the_order_shown() -> None:
    # Ten pairs; j says what k says on six, a tie on two where k decides, the opposite on two. Half
    # of k's verdicts are given with the answers shown in the other order.
    opposite = {"first": "second", "second": "first", "tie": "tie"}
    said = []
    for n, (mine, theirs) in enumerate(
        [("first", "first")] * 3
        + [("second", "second")] * 2
        + [("tie", "tie")]
        + [("tie", "first"), ("tie", "second")]
        + [("first", "second"), ("second", "first")]
    ):
        of = group("a", "b", question=f"q{n}")
        shown = (of, 0, 1, theirs) if n % 2 else (of, 1, 0, opposite[theirs])
        said.append((of, [by("j", of, 0, 1, mine), by("k", *shown)]))
    record = between(agreement(said), "j", "k")
    assert record.pairs == 10
    assert record.agreement.value == pytest.approx(6 / 10)
    # Neither says tie on 3 + 2 + 2 = 7, of which they agree on five.
    assert record.decided.value == pytest.approx(5 / 7)


@given(
    st.lists(
        st.tuples(st.sampled_from(VERDICTS), st.sampled_from(VERDICTS), st.booleans()),
        max_size=12,
    )
)
def test_showing_a_pair_the_other_way_round_changes_nothing(
    said: list[tuple[str | None, str | None, bool]],
) -> None:
    opposite = {"first": "second", "second": "first", "tie": "tie"}

    def told(turned: bool) -> Agreement:
        rows = []
        for n, (mine, theirs, swap) in enumerate(said):
            of = group("a", "b", question=f"q{n}")
            rows.append((of, [by("j", of, 0, 1, mine)] if mine else [failed("j", of, 0, 1)]))
            if theirs is not None:
                shown = (of, 1, 0, opposite[theirs]) if swap and turned else (of, 0, 1, theirs)
                rows[-1][1].append(by("k", *shown))
        return agreement(rows)

    assert told(True).between == told(False).between
    assert told(True).reliability == told(False).reliability


@given(st.permutations(range(6)))
def test_the_order_in_which_judgments_come_changes_nothing(order: list[int]) -> None:
    of = group("a", "bb", "ccc")
    judgments = [
        by("j", of, 0, 1, 0.9),
        by("j", of, 1, 0, 0.4),
        by("k", of, 0, 1, "second"),
        person("ann", of, 0, 1, "tie"),
        by("k", of, 1, 2, "first"),
        by("j", of, 2, 1, "first"),
    ]
    assert agreement([(of, [judgments[n] for n in order])]) == agreement([(of, judgments)])


def test_figures_of_categories_add_up_to_those_of_all_prompts() -> None:
    rows = []
    for n, category in enumerate(["chat", "chat", "code", None]):
        of = in_category(group("a", "bb", question=f"q{n}"), category)
        rows.append((of, [by("j", of, 0, 1, "first"), by("k", of, 0, 1, "first" if n else "tie")]))
    found = agreement(rows)
    assert [r.category for r in found.raters if r.rater == "j"] == [None, "", "chat", "code"]
    assert between(found, "j", "k").agreement.value == pytest.approx(3 / 4)
    assert between(found, "j", "k", "chat").agreement.value == pytest.approx(1 / 2)
    assert between(found, "j", "k", "code").agreement.value == 1.0
    assert among(found, "all judges").pairs == 4
    assert among(found, "all judges", "code").nominal.missing == "only one verdict occurs"
    assert sum(b.pairs for b in found.between if b.category is not None) == 4


def test_without_categories_there_are_no_figures_by_category() -> None:
    of = group("a", "b")
    found = agreement([(of, [by("j", of, 0, 1, "first"), by("k", of, 0, 1, "tie")])])
    assert {r.category for r in (*found.raters, *found.between, *found.reliability)} == {None}
    assert [r.raters for r in found.reliability] == ["all judges"]


def test_a_judge_that_favours_its_family_is_set_against_the_others() -> None:
    rows = []
    for n, (mine, others) in enumerate(
        [("first", "second"), ("first", "first"), ("tie", "second"), ("first", "tie")]
    ):
        of = by_models(group("a", "b", question=f"q{n}"), "gpt-3.5-turbo", "claude-2.1")
        said = [by("gpt-4o", of, 0, 1, mine), by("judge", of, 0, 1, others)]
        rows.append((of, [*said, person("ann", of, 0, 1, "second")]))
    found = agreement(rows)
    facts = rater(found, "gpt-4o")
    # Its family's answer, the first, wins 1 + 1 + 0.5 + 1 of 4. The other judge gives it
    # 0 + 1 + 0 + 0.5 and the person nothing: (0 + 0.5 + 0 + 0.25) / 4.
    assert facts.family == "gpt"
    assert facts.family_wins == pytest.approx(3.5 / 4)
    assert facts.family_wins_by_others == pytest.approx(0.75 / 4)
    assert rater(found, "judge").family_wins is None
    assert rater(found, "labelling/ann").family is None
    # The recipe knows which model its judge is: claude's answer is the second.
    named = rater(agreement(rows, {"judge": "anthropic/claude-sonnet-4"}), "judge")
    assert named.family_wins == pytest.approx((1 + 0 + 1 + 0.5) / 4)


def test_without_another_rater_nothing_is_said_of_a_judges_family() -> None:
    of = by_models(group("a", "b"), "gpt-4", "llama-2")
    alone = [by("gpt-4o", of, 0, 1, "first"), by("o/gpt-4", of, 0, 1, "first")]
    for judgments in (alone[:1], alone):
        facts = rater(agreement([(of, judgments)]), "gpt-4o")
        assert (facts.family, facts.family_wins, facts.family_wins_by_others) == ("gpt", None, None)


def test_two_answers_of_one_family_say_nothing_of_it() -> None:
    of = by_models(group("a", "b"), "gpt-4", "gpt-3.5-turbo")
    said = [by("gpt-4o", of, 0, 1, "first"), by("k", of, 0, 1, "first")]
    assert rater(agreement([(of, said)]), "gpt-4o").family_wins is None


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("gpt4_1106_preview", "gpt"),
        ("weighted_alpaca_eval_gpt4_turbo", "gpt"),
        ("anthropic/claude-3-haiku-20240307", "claude"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama"),
        ("Qwen/Qwen2.5-7B-Instruct/", "qwen"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistral"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", None),
        ("qwen/my-own-model", None),
        ("judge", None),
        ("", None),
    ],
)
def test_a_family_is_a_known_word_of_the_models_own_name(model: str, family: str | None) -> None:
    assert family_of(model) == family


def test_judgments_of_unknown_answers_and_of_one_against_itself_are_counted_and_not_used() -> None:
    of, other = group("a", "b"), group("a", "b", question="another")
    a, stranger = of.candidates[0].candidate_id, other.candidates[0].candidate_id
    judgments = [
        dataclasses.replace(by("j", of, 0, 1, "first"), candidate_ids=(a, stranger)),
        dataclasses.replace(by("j", of, 0, 1, "first"), candidate_ids=(a, a)),
        by("j", of, 0, 1, "second"),
    ]
    facts = rater(agreement([(of, judgments)]), "j")
    assert (facts.judgments, facts.unusable, facts.pairs, facts.first_rate) == (3, 2, 1, 0.0)


def test_a_duplicate_does_not_outweigh_the_other_order() -> None:
    of = group("a", "b")
    # In order 0.6 three times, swapped 0.7, that is 0.3 for a: (0.6 + 0.3) / 2 < 0.5, so b is
    # better; the mean of all four would be 0.525.
    said = [by("j", of, 0, 1, 0.6)] * 3 + [by("j", of, 1, 0, 0.7)]
    found = agreement([(of, [*said, by("k", of, 0, 1, "second")])])
    assert between(found, "j", "k").agreement.value == 1.0
    assert rater(found, "j").pairs == 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_the_same_probabilities_in_both_orders_are_a_tie_whatever_the_rounding(
    tenths: list[int], turned: bool
) -> None:
    of = group("a", "b")
    shown = (1, 0) if turned else (0, 1)
    said = [by("j", of, *shown, n / 10) for n in tenths]
    said.append(by("j", of, *shown[::-1], sum(tenths) / len(tenths) / 10))
    found = agreement([(of, [*said, by("k", of, 0, 1, "tie")])])
    assert between(found, "j", "k").agreement.value == 1.0


def test_failures_alone_leave_a_judge_with_its_missing_share() -> None:
    of = group("a", "b")
    found = agreement([(of, [failed("j", of, 0, 1), failed("j", of, 1, 0)])])
    facts = rater(found, "j")
    assert (facts.judgments, facts.missing, facts.pairs) == (2, 1.0, 0)
    assert (facts.consistency, facts.first_rate, facts.longer_wins) == (None, None, None)
    assert (found.between, found.reliability) == ((), ())


def test_without_judgments_there_is_nothing_to_say() -> None:
    assert agreement([]) == agreement([(group("a", "b"), [])]) == Agreement((), (), ())


def test_one_judge_has_nobody_to_agree_with() -> None:
    of = group("a", "b")
    found = agreement([(of, [by("j", of, 0, 1, "first")])])
    assert len(found.raters) == 1
    assert (found.between, found.reliability) == ((), ())


def test_where_only_ties_occur_the_coefficients_say_what_is_missing() -> None:
    rows = []
    for n in range(3):
        of = group("a", "bb", question=f"q{n}")
        rows.append((of, [by("j", of, 0, 1, "tie"), by("k", of, 1, 0, 0.5)]))
    found = agreement(rows)
    record = between(found, "j", "k")
    assert record.agreement.value == 1.0
    assert record.decided.missing == "no pair without a tie"
    assert record.kappa.missing == "only one verdict occurs"
    assert among(found, "all judges").nominal.missing == "only one verdict occurs"
    assert rater(found, "j").longer_wins == 0.5


def test_memory_does_not_grow_with_the_prompts() -> None:
    def rows(count: int) -> Iterator[tuple[Group, list[Judgment]]]:
        for n in range(count):
            of = group("a", "bb", question=f"q{n}")
            yield of, [by("j", of, 0, 1, "first"), by("k", of, 1, 0, "tie")]

    prompts = 3000
    tracemalloc.start()
    agreement(rows(prompts))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The ids alone would take more: 20 characters, a string of 69 bytes, twice a prompt.
    assert peak < 100 * prompts
