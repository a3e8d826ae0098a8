"""A model that scores each answer by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from generation.engine import Completion, Request
from judging.pointwise import PointwiseJudge, expected_score, pointwise
from judging.ranking import rank
from judging.rubric import load_rubric
from preferences.records import Judgment
from tests.judging.groups import group
from tests.judging.scripted_engine import ScriptedEngine, says


def judged(engine: ScriptedEngine, *answers: str, **criteria: float) -> list[Judgment]:
    values = {"kind": "pointwise", "name": "scorer", "model": "secret/m"}
    config = PointwiseJudge.model_validate({**values, "criteria": criteria or {"helpful": 1}})
    rubrics = {name: load_rubric(name, "pointwise") for name in config.criteria}
    return list(pointwise(config, rubrics, "identity", engine)([group(*answers)]))


def gives(*probabilities: float) -> ScriptedEngine:
    """An engine that gives the scores 1 to 5 these probabilities."""
    return ScriptedEngine(
        lambda r: Completion(r.request_id, "?", "stop", 10, 1, choice_probs=probabilities)
    )


def by_criterion(**replies: str) -> ScriptedEngine:
    """An engine that replies in words, by the criterion it is asked about."""
    aims = {name: load_rubric(name, "pointwise").text.split("\n")[0] for name in replies}

    def answer(request: Request) -> Completion:
        asked = request.messages[0].content
        (name,) = (n for n, aim in aims.items() if asked.startswith(aim))
        return Completion(request.request_id, replies[name], "stop", 10, 1, cost=0.25)

    return ScriptedEngine(answer)


def test_the_score_is_the_mean_over_the_digits_probabilities() -> None:
    (judgment,) = judged(gives(0.0, 0.2, 0.1, 0.1, 0.1), "red")
    # (2·0.2 + 3·0.1 + 4·0.1 + 5·0.1) / 0.5 = 1.6 / 0.5
    assert judgment.scores == pytest.approx((3.2,))
    assert judgment.verdict_mass == pytest.approx(0.5)
    assert judgment.kind == "pointwise"
    assert judgment.reply == "helpful: 3.20"
    assert (judgment.probability, judgment.verdict, judgment.failure) == (None, None, None)


@given(st.lists(st.floats(0, 0.2), min_size=5, max_size=5).filter(lambda p: sum(p) >= 0.05))
def test_a_score_is_never_outside_1_to_5_and_turns_around_with_its_probabilities(
    probabilities: list[float],
) -> None:
    found = expected_score(probabilities)
    turned = expected_score(probabilities[::-1])
    assert found is not None
    assert turned is not None
    assert 1 - 1e-9 <= found <= 5 + 1e-9
    # Scores s and 6 - s change places, so the means add up to 6.
    assert found + turned == pytest.approx(6)


def test_little_mass_on_the_digits_is_a_failure_and_no_middling_score() -> None:
    (judgment,) = judged(gives(0.01, 0.01, 0.0, 0.0, 0.0), "red")
    assert judgment.failure == "helpful: only 0.020 of the probability is on a score"
    assert judgment.scores is None
    assert judgment.verdict_mass == pytest.approx(0.02)


def test_criteria_count_by_their_weights() -> None:
    engine = by_criterion(helpful="5", concise="2")
    (judgment,) = judged(engine, "red", helpful=3, concise=1)
    # (3·5 + 1·2) / 4 = 17 / 4
    assert judgment.scores == pytest.approx((4.25,))
    assert judgment.reply == "helpful: 5\nconcise: 2"
    spent = (judgment.prompt_tokens, judgment.completion_tokens, judgment.cost)
    assert spent == (20, 2, 0.5)


def test_equal_weights_of_any_size_are_the_plain_mean() -> None:
    for weight in (0.1, 1.0, 7.0):
        engine = by_criterion(helpful="5", concise="2")
        (judgment,) = judged(engine, "red", helpful=weight, concise=weight)
        assert judgment.scores == pytest.approx((3.5,))


def test_one_criterion_that_cannot_be_read_leaves_the_answer_without_a_score() -> None:
    engine = by_criterion(helpful="5", concise="It depends")
    (judgment,) = judged(engine, "red", helpful=3, concise=1)
    assert judgment.failure == "concise: no verdict in reply"
    assert judgment.scores is None
    assert judgment.reply == "helpful: 5\nconcise: It depends\n\nIt depends"
    # Two questions, and the one that was not answered again.
    assert len(engine.asked) == 3


def test_who_gives_no_digit_is_asked_for_it_once_more() -> None:
    def answer(request: Request) -> Completion:
        text = "The" if request.choices else "**4**"
        return Completion(request.request_id, text, "stop")

    (judgment,) = judged(ScriptedEngine(answer), "red")
    assert judgment.scores == (4.0,)


def test_every_answer_is_asked_about_once_by_each_criterion_and_alone() -> None:
    engine = gives(0, 0, 0, 0, 1.0)
    judgments = judged(engine, "red", "green", "blue", helpful=1, honest=2)
    assert len(judgments) == 3
    assert len({j.judgment_id for j in judgments}) == 3
    assert len(engine.asked) == len({r.request_id for r in engine.asked}) == 6
    assert all(r.choices == ("1", "2", "3", "4", "5") for r in engine.asked)
    for request in engine.asked:
        text = request.messages[0].content
        assert sum(f"<answer>\n{a}\n</answer>" in text for a in ("red", "green", "blue")) == 1
        assert "secret" not in repr(request)
        assert "model 0" not in repr(request)


def test_each_score_is_of_the_answer_its_request_showed() -> None:
    digits = {"red": "2", "green": "5", "blue": "1"}

    def answer(request: Request) -> Completion:
        shown = request.messages[0].content.split("<answer>\n")[1].split("\n</answer>")[0]
        return Completion(request.request_id, digits[shown], "stop")

    of = group("red", "green", "blue")
    judgments = judged(ScriptedEngine(answer), "red", "green", "blue")
    found = {j.candidate_ids[0]: j.scores for j in judgments}
    expected = {c.candidate_id: (float(digits[c.response]),) for c in of.candidates}
    assert found == expected
    (ranking,) = rank([of], judgments)
    assert max(range(3), key=ranking.mean.__getitem__) == 1
    assert min(range(3), key=ranking.mean.__getitem__) == 2


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_a_weight_is_above_zero_and_finite(weight: float) -> None:
    with pytest.raises(ValidationError):
        judged(says("3"), "red", helpful=weight)


def test_no_criteria_are_refused() -> None:
    with pytest.raises(ValidationError):
        PointwiseJudge(kind="pointwise", name="x", model="m", criteria={})


def test_another_weight_is_another_judgment() -> None:
    ids = {judged(says("3"), "red", helpful=w, honest=1)[0].judgment_id for w in (1, 2)}
    assert len(ids) == 2
