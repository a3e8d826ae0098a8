"""An engine that remembers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from generation.engine import Completion, Request, Sampling
from generation.journalled import JournalledEngine, call_key
from preferences.errors import ServiceError
from preferences.journal import Journal
from preferences.records import Message
from preferences.store import Shard, Store
from tests.judging.scripted_engine import ScriptedEngine

WHOLE = Shard(0, 1)


def request(n: int, **values: object) -> Request:
    turns = (Message("user", f"question {n}"),)
    return dataclasses.replace(Request(f"r{n}", turns, Sampling(), seed=n), **values)  # type: ignore[arg-type]


def echo(asked: Request) -> Completion:
    probs = (0.75, 0.125) if asked.choices else None
    text = f"re: {asked.messages[0].content}"
    return Completion(asked.request_id, text, "stop", 3, 2, -1.5, probs, 0.25)


def complete(
    store: Store, engine: object, asked: Iterable[Request], told: list[bool] | None = None
) -> dict[str, Completion]:
    with Journal(store, "m", WHOLE) as journal:
        remembering = JournalledEngine(
            engine,  # type: ignore[arg-type]
            "m",
            journal,
            lambda completion, recorded: (told if told is not None else []).append(recorded),
        )
        return {c.request_id: c for c in remembering.complete(asked)}


@dataclasses.dataclass
class DiesAfter:
    """An engine that gives so many replies and is then down."""

    replies: int

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for number, asked in enumerate(requests):
            if number == self.replies:
                raise ServiceError("down")
            yield echo(asked)


def test_an_answered_call_is_never_made_again(tmp_path: Path) -> None:
    asked = [request(n, choices=("A", "B") if n % 2 else ()) for n in range(6)]
    first, second = ScriptedEngine(echo), ScriptedEngine(echo)
    told: list[bool] = []
    one = complete(Store(tmp_path), first, asked, told)
    other = complete(Store(tmp_path), second, asked, told)
    assert len(first.asked) == 6
    assert second.asked == []
    assert one == other == {r.request_id: echo(r) for r in asked}
    assert told == [False] * 6 + [True] * 6


def test_only_what_was_left_owed_is_asked_after_a_crash(tmp_path: Path) -> None:
    asked = [request(n) for n in range(5)]
    with pytest.raises(ServiceError):
        complete(Store(tmp_path), DiesAfter(3), asked)
    engine = ScriptedEngine(echo)
    assert complete(Store(tmp_path), engine, asked) == {r.request_id: echo(r) for r in asked}
    assert [r.request_id for r in engine.asked] == ["r3", "r4"]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": (Message("user", "another"),)},
        {"messages": (Message("system", "question 1"),)},
        {"sampling": Sampling(temperature=0.5)},
        {"seed": 2},
        {"seed": None},
        {"choices": ("A", "B")},
    ],
    ids=repr,
)
def test_whatever_can_change_the_reply_makes_it_another_call(change: dict[str, object]) -> None:
    assert call_key("m", request(1)) != call_key("m", request(1, **change))


def test_the_model_is_part_of_the_call_and_the_requests_name_is_not() -> None:
    assert call_key("m", request(1)) != call_key("other", request(1))
    assert call_key("m", request(1)) == call_key("m", request(1, request_id="renamed"))


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"text": "x"},
        {"text": "x", "finish_reason": "stop", "surprise": 1},
        {"text": "x", "finish_reason": "stop", "choice_probs": ["much", None]},
    ],
    ids=json.dumps,
)
def test_a_malformed_reply_on_record_is_owed_again(
    tmp_path: Path, reply: dict[str, object]
) -> None:
    store = Store(tmp_path)
    with Journal(store, "m", WHOLE) as journal:
        journal.put(call_key("m", request(1)), reply)
    engine = ScriptedEngine(echo)
    assert complete(store, engine, [request(1)]) == {"r1": echo(request(1))}
    assert len(engine.asked) == 1


def test_a_reply_is_on_record_before_it_is_handed_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Journal(store, "m", WHOLE) as journal:
        remembering = JournalledEngine(ScriptedEngine(echo), "m", journal)
        next(remembering.complete([request(1)]))
        recorded = Journal(Store(tmp_path), "m", WHOLE).get(call_key("m", request(1)))
    assert recorded is not None
    assert recorded["text"] == "re: question 1"
