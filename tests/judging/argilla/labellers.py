"""Questions with a known right answer, and people who answer them as Argilla's UI does."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from judging.argilla.api import connect
from judging.argilla.labels import ArgillaPeople
from judging.argilla.server import Address
from judging.people import Purpose, Question, question
from preferences.records import Candidate, Prompt, Verdict, messages_from, prompt_identity
from tests.judging.argilla.argilla_api import Client
from tests.judging.argilla.conftest import client_of

Record = dict[str, Any]


def key_of(address: Address, username: str) -> str:
    """The API key of one of the accounts of a server's first start."""
    return {account.username: account.api_key for account in address.created}[username]


def new_name() -> str:
    """A recipe's that no other test uses."""
    return f"recipe-{time.monotonic_ns()}"


def people_at(address: Address, name: str, overlap: int = 3) -> ArgillaPeople:
    """Those who label for a recipe."""
    api = connect(address.url, key_of(address, "owner"))
    return ArgillaPeople(api, name, lambda ranking: "Prefer the better answer.", overlap)


def about_qualities(
    number: int, qualities: Sequence[int], purpose: Purpose = "ask", category: str | None = "maths"
) -> Question:
    """A question about answers of these qualities, which stand in their texts."""
    messages = messages_from(f"This is prompt {number}.")
    prompt = Prompt(prompt_identity(messages), messages, "test", category=category)
    texts = (f"An answer to prompt {number} of quality {quality}." for quality in qualities)
    candidates = [
        Candidate(f"c{number}-{n}-{quality}", prompt.prompt_id, f"model {n}", text, "complete", n)
        for n, (quality, text) in enumerate(zip(qualities, texts, strict=True))
    ]
    return question(prompt, candidates, purpose)


def random_qualities(rng: random.Random, answers: int) -> list[int]:
    """With ties, sometimes of all."""
    return [rng.randint(1, answers) for _ in range(answers)]


def planted(candidate_ids: Sequence[str]) -> tuple[int, ...]:
    """The qualities of candidates, in their order; of a candidate, the number its id ends with."""
    return tuple(int(candidate_id.rsplit("-", 1)[1]) for candidate_id in candidate_ids)


def verdict_of(first: int, second: int) -> Verdict:
    """On two qualities."""
    return "tie" if first == second else "first" if first > second else "second"


def qualities_shown(record: Record) -> list[int]:
    """What a labeller reads in the answers, from A on."""
    answers = record["fields"]["comparison"]["answers"]
    texts = [json.dumps(answer) for answer in answers]
    return [int(re.findall(r"of quality (\d)", text)[0]) for text in texts]


def pair_values(label: str, **others: str) -> Record:
    """An answer to a pair: a, b, tie or both bad."""
    return {"better": {"value": label}} | {name: {"value": said} for name, said in others.items()}


def ranking_values(ranks: Sequence[int]) -> Record:
    """An answer to a ranking as the UI submits it: in the order of the options."""
    placed = [{"value": label, "rank": rank} for label, rank in zip("ABCDEF", ranks, strict=False)]
    return {"order": {"value": placed}}


def honest(record: Record) -> Record:
    """The answer of somebody who reads both answers and prefers the better."""
    shown = qualities_shown(record)
    if len(shown) > 2:
        # The best on the first place; equal ones share it, and the next places stay empty.
        return ranking_values([1 + sum(q > quality for q in shown) for quality in shown])
    first, second = shown
    return pair_values("tie" if first == second else "a" if first > second else "b")


class Labeller:
    """Somebody who signs in as the UI does, and answers what it shows."""

    def __init__(self, address: Address, name: str | None = None) -> None:
        """A new annotator of the workspace."""
        owner = client_of(address, "owner")
        (workspace,) = owner("GET", "/me/workspaces")["items"]
        self.name = name or f"person-{time.monotonic_ns()}"
        account = {"username": self.name, "first_name": self.name, "password": "a" * 10}
        self.id = owner("POST", "/users", {**account, "role": "annotator"})["id"]
        owner("POST", f"/workspaces/{workspace['id']}/users", {"user_id": self.id})
        key = owner("GET", f"/users/{self.id}")["api_key"]
        self.client = Client(address.url, key)

    def datasets(self, recipe: str) -> Mapping[str, str]:
        """The ids of a recipe's datasets, by name."""
        found = self.client("GET", "/me/datasets")["items"]
        return {d["name"]: d["id"] for d in found if d["name"].startswith(recipe)}

    def queue(self, dataset: str, limit: int = 1000) -> list[Record]:
        """The records that the UI shows as pending."""
        pending = [
            {"type": "terms", "scope": {"entity": entity, "property": "status"}, "values": [status]}
            for entity, status in (("response", "pending"), ("record", "pending"))
        ]
        reply = self.client(
            "POST",
            f"/me/datasets/{dataset}/records/search",
            {"filters": {"and": pending}},
            include="responses",
            limit=limit,
        )
        return [item["record"] for item in reply["items"]]

    def answer(self, record: Record, values: Record | None, status: str = "submitted") -> Record:
        """Answer a record, or put the answer aside."""
        body = {"status": status} if values is None else {"status": status, "values": values}
        said: Record = self.client("POST", f"/records/{record['id']}/responses", body)
        return said

    def change(self, response: Record, values: Record, status: str = "submitted") -> Record:
        """Say something else."""
        body = {"status": status, "values": values}
        said: Record = self.client("PUT", f"/responses/{response['id']}", body)
        return said

    def answer_all(self, recipe: str, say: Callable[[Record], Record] = honest) -> int:
        """Answer all that is pending in a recipe's datasets; returns how much that was."""
        answered = 0
        for dataset in self.datasets(recipe).values():
            for record in self.queue(dataset):
                self.answer(record, say(record))
                answered += 1
        return answered
