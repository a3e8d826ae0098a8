"""A model reads all answers to a prompt at once and puts them in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import Field

from generation.engine import Completion, Engine, EngineConfig, Request, Sampling
from judging.asking import Exchange, ask, spent, unread
from judging.judge import Group, Judge
from judging.rubric import LABELS, Rubric
from judging.verdicts import Order, order
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Judgment, Message

ONE_LINE = Sampling(temperature=0.0, max_tokens=128)
"""Room for 26 letters with signs between them."""
ONCE_MORE = (
    "Now give the order alone: reply with the letters of all the answers, the best first, joined "
    "by > or =, and nothing else."
)


class ListwiseJudge(EngineConfig):
    """A language model that orders all answers to a prompt."""

    kind: Literal["listwise"]
    name: str
    """What the records call this judge."""
    rubric: str = "helpful"
    """A rubric that ships, by name, or a text file of your own."""
    rounds: int = Field(2, ge=1)
    """How often it is asked, each time with the answers in another order. Every second order is
    the one before turned around, so that a liking for a place cancels out."""


@dataclasses.dataclass(frozen=True, slots=True)
class _List:
    """A group in the order in which the judge reads it."""

    request_id: str
    group: Group
    shown: tuple[Candidate, ...]

    @property
    def labels(self) -> str:
        return LABELS[: len(self.shown)]


def listwise(config: ListwiseJudge, rubric: Rubric, model_identity: str, engine: Engine) -> Judge:
    """A judge that orders groups of 2 to 26 answers. Its scores are minus the places: -1 the best.

    Answers that it calls as good as each other share a place. A group that has more answers than
    there are letters is a failure record.
    """

    def judge(groups: Iterable[Group]) -> Iterator[Judgment]:
        lists = [
            _List(_identity(shown, rubric, model_identity), group, shown)
            for group in groups
            if len(group.candidates) > 1
            for shown in orders_shown(group, config.rounds)
        ]
        short = {one.request_id: one for one in lists if len(one.shown) <= len(LABELS)}

        def is_read(completion: Completion) -> bool:
            return _order(completion, short[completion.request_id].labels) is not None

        requests = [_request(one, rubric) for one in short.values()]
        said = dict(zip(short, ask(engine, requests, is_read, ONCE_MORE, ONE_LINE), strict=True))
        for one in lists:
            yield _judgment(config.name, one, said.get(one.request_id))

    return judge


def orders_shown(group: Group, rounds: int) -> list[tuple[Candidate, ...]]:
    """At most `rounds` different orders of a group, drawn by its prompt's id."""
    found: dict[tuple[str, ...], tuple[Candidate, ...]] = {}
    for number in range(rounds):
        draw = {
            c: fingerprint([group.prompt.prompt_id, number // 2, c.candidate_id])
            for c in group.candidates
        }
        ordered = sorted(group.candidates, key=draw.__getitem__)
        shown = tuple(reversed(ordered)) if number % 2 else tuple(ordered)
        found.setdefault(tuple(c.candidate_id for c in shown), shown)
    return list(found.values())


def _identity(shown: tuple[Candidate, ...], rubric: Rubric, model_identity: str) -> str:
    return fingerprint([model_identity, rubric.identity, [c.candidate_id for c in shown]])


def _request(one: _List, rubric: Rubric) -> Request:
    question = rubric.render_list(one.group.prompt, one.shown)
    return Request(one.request_id, (Message("user", question),), ONE_LINE)


def _order(completion: Completion, labels: str) -> Order | None:
    return order(completion.text, labels) if completion.finish_reason == "stop" else None


def _judgment(judge: str, one: _List, exchange: Exchange | None) -> Judgment:
    judgment = Judgment(
        judgment_id=one.request_id,
        prompt_id=one.group.prompt.prompt_id,
        kind="listwise",
        judge=judge,
        candidate_ids=tuple(c.candidate_id for c in one.shown),
        reply=exchange.text if exchange else None,
        **spent([exchange] if exchange else []),
    )
    if exchange is None:
        failure = f"{len(one.shown)} answers; a list has letters for {len(LABELS)}"
        return dataclasses.replace(judgment, failure=failure)
    found = _order(exchange.last, one.labels)
    if found is None:
        return dataclasses.replace(judgment, failure=unread(exchange.last))
    place = {label: n for n, tier in enumerate(found, start=1) for label in tier}
    scores = tuple(-float(place[label]) for label in one.labels)
    return dataclasses.replace(judgment, scores=scores)
