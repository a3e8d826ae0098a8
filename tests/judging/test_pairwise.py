"""A model that compares two answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from generation.engine import Completion, Request
from judging.judge import Comparison
from judging.pairwise import PairwiseJudge, by_letter, pairwise
from judging.ranking import comparisons, rank
from judging.rubric import Rubric, load_rubric
from preferences.records import Judgment
from tests.judging.groups import group
from tests.judging.scripted_engine import ScriptedEngine, leans, says

CONFIG = PairwiseJudge(kind="pairwise", name="the judge", model="secret/judge-model")
HELPFUL = load_rubric("helpful")


def ask(engine: ScriptedEngine, *answers: str) -> list[Judgment]:
    of = group(*answers)
    return list(pairwise(CONFIG, HELPFUL, "identity", engine)([of]))


def test_every_pair_is_asked_in_both_orders() -> None:
    engine = leans(0.6, 0.3)
    of = group("red", "green", "blue")
    judgments = list(pairwise(CONFIG, HELPFUL, "identity", engine)([of]))
    r, g, b = (c.candidate_id for c in of.candidates)
    both_ways = {(r, g), (g, r), (r, b), (b, r), (g, b), (b, g)}
    assert {j.candidate_ids for j in judgments} == both_ways
    assert len(judgments) == len(engine.asked) == len({j.judgment_id for j in judgments}) == 6


def test_each_judgment_is_of_the_answers_its_request_showed_in_that_order() -> None:
    def prefers_red(request: Request) -> Completion:
        text = request.messages[0].content
        red_first = "red" in text.split("<answer_A>")[1].split("</answer_A>")[0]
        probs = (0.9, 0.1) if red_first else (0.1, 0.9)
        return Completion(request.request_id, "?", "stop", choice_probs=probs)

    of = group("green", "red", "blue")
    red = of.candidates[1].candidate_id
    # Only the pairs with red in them say anything about it.
    judgments = pairwise(CONFIG, HELPFUL, "identity", ScriptedEngine(prefers_red))([of])
    for first, second, probability in comparisons(judgments):
        if red in (first, second):
            assert probability == pytest.approx(0.9 if first == red else 0.1)


def test_the_probability_is_the_share_of_the_verdicts_mass() -> None:
    (first, _) = ask(leans(0.6, 0.2), "red", "green")
    # 0.6 / (0.6 + 0.2) = 0.75
    assert first.probability == pytest.approx(0.75)
    assert first.verdict_mass == pytest.approx(0.8)
    assert first.verdict is None
    assert first.failure is None


def test_little_mass_on_a_verdict_is_a_failure_and_no_tie() -> None:
    (first, _) = ask(leans(0.02, 0.02), "red", "green")
    assert first.failure == "only 0.040 of the probability is on a verdict"
    assert (first.probability, first.verdict, first.scores) == (None, None, None)
    (zero, _) = ask(leans(0.0, 0.0), "red", "green")
    assert zero.failure is not None


def test_without_probabilities_the_words_are_read() -> None:
    assert [j.verdict for j in ask(says("B"), "red", "green")] == ["second", "second"]


@pytest.mark.parametrize("reply", ["I like A better than B", "[[A]] [[B]]", "5", "the [[A]] in it"])
def test_an_unreadable_reply_is_a_failure_and_no_tie(reply: str) -> None:
    for judgment in ask(says(reply), "red", "green"):
        assert judgment.failure == "no verdict in reply"
        # Both replies are kept: the first and the one to being asked again.
        assert judgment.reply == f"{reply}\n\n{reply}"
        assert (judgment.probability, judgment.verdict, judgment.scores) == (None, None, None)


def at_first(first: str, then: str) -> Callable[[Request], Completion]:
    """Answers one thing where probabilities are asked for and another where words are."""
    return lambda request: Completion(
        request.request_id, first if request.choices else then, "stop", 10, 2, cost=0.25
    )


def test_who_says_no_verdict_is_asked_for_it_once_more_and_sees_what_it_said() -> None:
    engine = ScriptedEngine(at_first("Well", " [[B]] "))
    of = group("red", "green")
    (judgment,) = by_letter(CONFIG, HELPFUL, "identity", engine)(
        [Comparison(of.prompt, *of.candidates)]
    )
    assert judgment.verdict == "second"
    assert judgment.failure is None
    assert judgment.reply == "Well\n\n [[B]] "
    # Two calls, each of 10 and 2 tokens for 0.25.
    spent = (judgment.prompt_tokens, judgment.completion_tokens, judgment.cost)
    assert spent == (20, 4, 0.5)
    first, again = engine.asked
    assert [m.role for m in again.messages] == ["user", "assistant", "user"]
    assert again.messages[0] == first.messages[0]
    assert again.messages[1].content == "Well"
    assert again.messages[2].content.startswith("Now give the verdict alone")
    assert again.choices == ()


def test_an_empty_reply_is_no_turn_of_its_own() -> None:
    # Chat templates and endpoints refuse a turn without words, and two user turns in a row.
    engine = ScriptedEngine(at_first(" \n", "A"))
    of = group("red", "green")
    (judgment,) = by_letter(CONFIG, HELPFUL, "identity", engine)(
        [Comparison(of.prompt, *of.candidates)]
    )
    assert judgment.verdict == "first"
    (message,) = engine.asked[1].messages
    question = engine.asked[0].messages[0].content
    assert message.content.startswith(question)
    assert "verdict alone" in message.content.removeprefix(question)


def test_nobody_is_asked_a_third_time() -> None:
    engine = says("Hm")
    ask(engine, "red", "green")
    assert len(engine.asked) == 4
    assert len({r.request_id for r in engine.asked}) == 4


def test_who_gave_probabilities_is_not_asked_again() -> None:
    engine = leans(0.01, 0.01)
    ask(engine, "red", "green")
    assert len(engine.asked) == 2


def test_a_call_that_failed_is_a_failure_with_its_reason() -> None:
    def fails(request: Request) -> Completion:
        return Completion(request.request_id, "", "failed", failure="prompt too long")

    of = group("red", "green")
    judgments = list(pairwise(CONFIG, HELPFUL, "identity", ScriptedEngine(fails))([of]))
    assert [j.failure for j in judgments] == ["prompt too long"] * 2
    (ranking,) = rank([of], judgments)
    assert ranking.mean == (0, 0)


def test_comparisons_are_answered_one_by_one_in_the_order_asked() -> None:
    def prefers_red(request: Request) -> Completion:
        text = request.messages[0].content
        red_first = "red" in text.split("<answer_A>")[1].split("</answer_A>")[0]
        return Completion(request.request_id, "A" if red_first else "B", "stop")

    of = group("red", "green", "blue")
    r, g, b = of.candidates
    asked = [Comparison(of.prompt, *two) for two in ((g, r), (r, b), (r, g))]
    judgments = by_letter(CONFIG, HELPFUL, "identity", ScriptedEngine(prefers_red))(asked)
    assert [j.verdict for j in judgments] == ["second", "first", "first"]
    shown = [(c.first.candidate_id, c.second.candidate_id) for c in asked]
    assert [j.candidate_ids for j in judgments] == shown


def test_no_request_names_a_model() -> None:
    engine = leans(0.5, 0.5)
    ask(engine, "red", "green")
    for request in engine.asked:
        assert "model 0" not in repr(request)
        assert "model 1" not in repr(request)
        assert "judge-model" not in repr(request)


def test_fewer_than_two_answers_are_not_asked_about() -> None:
    engine = leans(0.5, 0.5)
    assert ask(engine, "red") == []
    assert engine.asked == []


def test_an_edited_rubric_is_asked_anew() -> None:
    edited = Rubric("helpful", HELPFUL.text + " Please.")
    of = group("red", "green")
    engines = [leans(0.5, 0.5), leans(0.5, 0.5)]
    for engine, rubric in zip(engines, (HELPFUL, edited), strict=True):
        list(pairwise(CONFIG, rubric, "identity", engine)([of]))
    one, other = ({r.request_id for r in engine.asked} for engine in engines)
    assert one.isdisjoint(other)
