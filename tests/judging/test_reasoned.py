"""A model that gives reasons before its verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from generation.engine import Completion, FinishReason, Request
from judging.judge import Comparison
from judging.ranking import rank
from judging.reasoned import ReasonedPairwiseJudge, by_reasoning, pairwise_reasoned
from judging.rubric import load_rubric
from preferences.records import Judgment
from tests.judging.groups import group
from tests.judging.scripted_engine import ScriptedEngine, says

HELPFUL = load_rubric("helpful", "pairwise_reasoned")


def config(samples: int = 1, **changes: object) -> ReasonedPairwiseJudge:
    values = {"kind": "pairwise_reasoned", "name": "thinker", "model": "secret/m", **changes}
    return ReasonedPairwiseJudge.model_validate({**values, "samples": samples})


def compared(engine: ScriptedEngine, samples: int = 1) -> Judgment:
    of = group("red", "green")
    compare = by_reasoning(config(samples), HELPFUL, "identity", engine)
    (judgment,) = compare([Comparison(of.prompt, *of.candidates)])
    return judgment


def in_turn(*replies: str) -> Callable[[Request], Completion]:
    """Gives these replies in turn, whatever is asked; each is of 10 and 5 tokens for 0.5."""
    left = iter(replies)
    return lambda request: Completion(request.request_id, next(left), "stop", 10, 5, cost=0.5)


def test_one_reply_gives_its_verdict_and_keeps_its_reasons() -> None:
    judgment = compared(says("A is wrong about it.\n\n[[B]]"))
    assert judgment.kind == "pairwise_reasoned"
    assert judgment.verdict == "second"
    assert judgment.probability is None
    assert judgment.failure is None
    assert judgment.reply == "A is wrong about it.\n\n[[B]]"


def test_several_replies_give_the_share_of_those_for_the_first() -> None:
    engine = ScriptedEngine(in_turn("x\n[[A]]", "y\n[[A]]", "z\n[[B]]", "v\n[[C]]"))
    judgment = compared(engine, samples=4)
    # Two for the first, a tie that counts half, one for the second: 2.5 of 4.
    assert judgment.probability == pytest.approx(0.625)
    assert judgment.verdict is None
    assert judgment.verdict_mass == 1
    spent = (judgment.prompt_tokens, judgment.completion_tokens, judgment.cost)
    assert spent == (40, 20, 2.0)
    assert len({(r.request_id, r.seed) for r in engine.asked}) == 4
    assert len({r.seed for r in engine.asked}) == 4
    assert {r.sampling.temperature for r in engine.asked} == {0.7}


def test_replies_that_cannot_be_read_do_not_count() -> None:
    # The last two are the second tries of two that said nothing.
    said = ["x\n[[A]]", "no idea", "none", "y\n[[A]]", "[[B]]", "still none"]
    engine = ScriptedEngine(in_turn(*said))
    judgment = compared(engine, samples=4)
    assert len(engine.asked) == 6
    # Two for the first and one for the second of the three that were read.
    assert judgment.probability == pytest.approx(2 / 3)
    assert judgment.verdict_mass == pytest.approx(3 / 4)


def test_no_readable_reply_is_a_failure_and_no_tie() -> None:
    for samples in (1, 3):
        judgment = compared(says("Both have their merits."), samples)
        assert judgment.failure == "no verdict in reply"
        assert (judgment.probability, judgment.verdict, judgment.scores) == (None, None, None)
        assert judgment.reply is not None
        assert judgment.reply.count("Both have their merits.") == 2 * samples


@pytest.mark.parametrize("cut", ["A has", "It quotes:\n[[B]]"])
def test_a_reply_that_was_cut_off_is_asked_for_its_verdict_whatever_it_ends_with(cut: str) -> None:
    def answer(request: Request) -> Completion:
        first = len(request.messages) == 1
        reason: FinishReason = "length" if first else "stop"
        return Completion(request.request_id, cut if first else "[[A]]", reason)

    engine = ScriptedEngine(answer)
    judgment = compared(engine)
    assert judgment.verdict == "first"
    assert [m.content for m in engine.asked[1].messages][1] == cut


def test_cut_off_twice_is_a_failure_that_says_so() -> None:
    engine = ScriptedEngine(lambda r: Completion(r.request_id, "Well, [[A]]", "length"))
    judgment = compared(engine)
    assert judgment.failure == "cut off before a verdict"
    assert judgment.verdict is None
    assert len(engine.asked) == 2


def test_a_call_that_failed_is_a_failure_with_its_reason_and_is_not_made_again() -> None:
    engine = ScriptedEngine(lambda r: Completion(r.request_id, "", "failed", failure="too long"))
    assert compared(engine).failure == "too long"
    assert len(engine.asked) == 1


def test_every_pair_is_asked_in_both_orders_and_the_better_answer_ranks_first() -> None:
    def prefers_red(request: Request) -> Completion:
        text = request.messages[0].content
        red_first = "red" in text.split("<answer_A>")[1].split("</answer_A>")[0]
        letter = "A" if red_first else "B" if "red" in text else "C"
        return Completion(request.request_id, f"Because.\n[[{letter}]]", "stop")

    of = group("green", "red", "blue")
    engine = ScriptedEngine(prefers_red)
    judgments = list(pairwise_reasoned(config(2), HELPFUL, "identity", engine)([of]))
    # Three pairs, two orders; each asked twice.
    assert (len(judgments), len(engine.asked)) == (6, 12)
    assert len({j.judgment_id for j in judgments}) == 6
    orders = Counter(frozenset(j.candidate_ids) for j in judgments)
    assert set(orders.values()) == {2}
    (ranking,) = rank([of], judgments)
    assert max(range(3), key=ranking.mean.__getitem__) == 1
    assert ranking.mean[0] == pytest.approx(ranking.mean[2], abs=1e-6)


def test_more_samples_or_another_temperature_are_other_judgments() -> None:
    of = group("red", "green")
    ids = {
        j.judgment_id
        for c in (config(), config(2), config(temperature=1.0), config(max_tokens=99))
        for j in pairwise_reasoned(c, HELPFUL, "identity", says("[[A]]"))([of])
    }
    assert len(ids) == 8


def test_several_samples_at_temperature_0_are_refused() -> None:
    with pytest.raises(ValidationError, match="3 times the same; raise `temperature`"):
        config(3, temperature=0)
    config(1, temperature=0)


def test_no_request_names_a_model() -> None:
    engine = says("[[A]]")
    compared(engine)
    assert "model 0" not in repr(engine.asked)
    assert "secret" not in repr(engine.asked)
