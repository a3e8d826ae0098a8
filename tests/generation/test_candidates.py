"""Answers, sampled and imported."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from generation.candidates import (
    ImportedCandidates,
    SampledCandidates,
    import_candidates,
    requests,
    sample,
)
from generation.engine import Completion, Request, Sampling
from preferences.conversations import make_prompt
from preferences.errors import InputError
from preferences.records import Candidate, Dropped, Message, Prompt
from tests.judging.scripted_engine import ScriptedEngine

CONFIG = SampledCandidates(kind="sample", name="policy", model="org/model", samples=3)


def prompt(text: str) -> Prompt:
    return make_prompt((Message("user", text),), "p.jsonl:1")


PROMPTS = [prompt("Why?"), prompt("How?")]


def test_every_wanted_answer_is_asked_for_with_a_seed_of_its_own() -> None:
    asked = list(requests(PROMPTS, CONFIG, "m"))
    assert len({r.request_id for r in asked}) == len({r.seed for r in asked}) == 6
    assert [r.messages[0].content for r in asked] == ["Why?"] * 3 + ["How?"] * 3
    assert asked == list(requests(PROMPTS, CONFIG, "m"))


def test_more_samples_and_more_prompts_keep_the_answers_there_are() -> None:
    few = {r.request_id for r in requests(PROMPTS[:1], CONFIG, "m")}
    more = CONFIG.model_copy(update={"samples": 5})
    many = {r.request_id for r in requests(PROMPTS[::-1], more, "m")}
    assert few < many


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"sampling": Sampling(temperature=0.5)}], ids=["seed", "sampling"]
)
def test_other_sampling_is_other_requests(change: dict[str, Any]) -> None:
    one = {r.request_id for r in requests(PROMPTS, CONFIG, "m")}
    assert one.isdisjoint(
        r.request_id for r in requests(PROMPTS, CONFIG.model_copy(update=change), "m")
    )
    assert one.isdisjoint(r.request_id for r in requests(PROMPTS, CONFIG, "another model"))


def test_an_answer_belongs_to_its_prompt_in_whatever_order_it_comes() -> None:
    def echoes(request: Request) -> Completion:
        return Completion(request.request_id, f"re: {request.messages[0].content}", "stop")

    found = sample(PROMPTS, CONFIG, "m", ScriptedEngine(echoes))
    texts = {p.prompt_id: f"re: {p.messages[0].content}" for p in PROMPTS}
    assert all(c.response == texts[c.prompt_id] for c in found)
    assert [c.prompt_id for c in found] == [p.prompt_id for p in PROMPTS for _ in range(3)]
    assert [c.index for c in found] == [0, 1, 2, 0, 1, 2]
    assert {c.model for c in found} == {"policy"}


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        (Completion("", "well", "stop"), "complete"),
        (Completion("", "well", "length"), "truncated"),
        (Completion("", " \n", "stop"), "empty"),
        (Completion("", "", "length"), "empty"),
        (Completion("", "", "failed", failure="too long"), "failed"),
    ],
)
def test_a_bad_answer_is_a_record_with_its_status(completion: Completion, status: str) -> None:
    engine = ScriptedEngine(lambda r: dataclasses.replace(completion, request_id=r.request_id))
    found = sample(PROMPTS, CONFIG, "m", engine)
    assert [(c.status, c.failure) for c in found] == [(status, completion.failure)] * 6


# Imported answers


def imported(rows: list[dict[str, Any]], **config: Any) -> list[Candidate | Dropped]:
    table = ImportedCandidates(kind="import", name="table", source="a.jsonl", **config)
    places = [(f"a.jsonl:{n}", row) for n, row in enumerate(rows, 1)]
    ids = frozenset(p.prompt_id for p in PROMPTS)
    return list(import_candidates(table, places, ids))


def test_imported_answers_are_taken_once_and_only_to_known_prompts() -> None:
    rows = [
        {"prompt": "Why?", "model": "m", "response": "so", "response_id": 7},
        {"prompt": "How?", "model": "m", "response": " "},
        {"prompt": "Why?", "model": "m", "response": "so", "response_id": 7},
        {"prompt": "Who?", "model": "m", "response": "me"},
        {"prompt": "Why?", "model": "n", "response": "so"},
    ]
    found = imported(rows)
    kept = [c for c in found if isinstance(c, Candidate)]
    assert [(c.prompt_id, c.model, c.status) for c in kept] == [
        (PROMPTS[0].prompt_id, "m", "complete"),
        (PROMPTS[1].prompt_id, "m", "empty"),
        (PROMPTS[0].prompt_id, "n", "complete"),
    ]
    assert kept[0].source_id == "7"
    drops = [(d.reason, d.detail) for d in found if isinstance(d, Dropped)]
    assert drops == [("duplicate", "a.jsonl:3"), ("unknown_prompt", "a.jsonl:4")]


def test_a_pair_gives_both_its_answers() -> None:
    found = imported([{"prompt": "Why?", "chosen": "so", "rejected": "no"}], format="preferences")
    assert [c.response for c in found if isinstance(c, Candidate)] == ["so", "no"]


def test_a_missing_answer_names_the_place_and_suggests() -> None:
    with pytest.raises(
        InputError, match=r"a\.jsonl:1: no column 'response'; did you mean 'respons"
    ):
        imported([{"prompt": "Why?", "model": "m", "responses": "so"}])
