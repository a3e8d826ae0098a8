"""People who label in Argilla, from a recipe's questions to its dataset."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from flows import labelling, labels
from flows.poll import is_due
from flows.run import Run
from flows.webhook import DESCRIPTION, told_of_answers
from judging.argilla.api import connect
from judging.argilla.environment import argilla_python
from judging.argilla.server import Address, running
from preferences.errors import ServiceError
from preferences.records import Candidate, Judgment
from preferences.store import Store
from tests.flows.test_people import BUDGET, World, world
from tests.judging.argilla.conftest import client_of

__all__ = ["world"]


@pytest.fixture(scope="module")
def argilla(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    try:
        argilla_python(print)
    except ServiceError as error:
        if "from versions: none" in str(error):
            pytest.skip(f"pip reaches no packages here: {error}")
        raise
    with running(tmp_path_factory.mktemp("argilla") / "home", port=0) as address:
        yield address


@pytest.fixture
def asking(world: World, argilla: Address, monkeypatch: pytest.MonkeyPatch) -> World:
    """The sixty prompts, about which people are asked in Argilla."""
    keys = {account.username: account.api_key for account in argilla.created}
    monkeypatch.setenv("ARGILLA_API_URL", argilla.url)
    monkeypatch.setenv("ARGILLA_API_KEY", keys["owner"])
    text = world.recipe.read_text().replace("name: asking", f"name: {world.folder.name}")
    world.recipe.write_text(text)
    world.change(labels="argilla", overlap=2)
    return world


def texts_of(run: Run) -> dict[str, str]:
    return {
        c.candidate_id: c.response
        for artifact in run.plan.candidates
        for c in run.store.read(artifact, Candidate)
    }


def answer_all(argilla: Address, username: str, run: Run, prefer: Callable[[str, str], str]) -> int:
    """Have somebody answer everything that Argilla shows as pending; returns how much it was."""
    person, owner = client_of(argilla, username), client_of(argilla, "owner")
    texts, count = texts_of(run), 0
    for dataset in person("GET", "/me/datasets")["items"]:
        if not dataset["name"].startswith(run.plan.recipe.name):
            continue
        statuses = [
            {
                "type": "terms",
                "scope": {"entity": entity, "property": "status"},
                "values": ["pending"],
            }
            for entity in ("response", "record")
        ]
        # Annotators are not told which answer is whose.
        held = owner("GET", f"/datasets/{dataset['id']}/records", limit=1000)["items"]
        about = {record["id"]: record["metadata"]["about"].split() for record in held}
        path = f"/me/datasets/{dataset['id']}/records/search"
        body = {"filters": {"and": statuses}}
        for item in person("POST", path, body, limit=1000)["items"]:
            assert username == "admin" or not item["record"]["metadata"]
            first, second = about[item["record"]["id"]][2:]
            better = "a" if prefer(texts[first], texts[second]) == texts[first] else "b"
            said = {"status": "submitted", "values": {"better": {"value": better}}}
            person("POST", f"/records/{item['record']['id']}/responses", said)
            count += 1
    return count


def test_questions_go_to_argilla_and_answers_change_the_dataset(
    asking: World, argilla: Address
) -> None:
    before = asking.build()
    # The judge prefers lower numbers; these people prefer higher ones. 30 of 40 are of the random
    # slice, which two people answer each.
    assert answer_all(argilla, "annotator", before, max) == BUDGET
    assert answer_all(argilla, "admin", before, max) == 30
    where = (asking.recipe, {}, before.store.url)
    assert labelling.pull(*where) == 70
    assert labelling.pull(*where) == 0
    after = asking.build()
    assert after.plan.answers is not None
    assert after.plan.dataset != before.plan.dataset
    said = list(after.store.read(after.plan.answers, Judgment))
    assert len(said) == 70
    texts = texts_of(after)
    for judgment in said:
        won = judgment.candidate_ids[0 if judgment.verdict == "first" else 1]
        assert texts[won] == max(texts[i] for i in judgment.candidate_ids)
        assert judgment.suggested is False
    assert {j.annotator for j in said} == {"annotator", "admin"}
    # As both prefer the same, they agree on the 30 that both were shown.
    line, people = labelling.status(*where)
    assert "all 70 answers are in Argilla" in line
    assert people is not None
    assert (people.pairs, people.agreement.value) == (30, 1.0)
    # Nothing new, nothing to do.
    assert asking.build().plan.dataset == after.plan.dataset


def test_a_poll_finds_that_people_are_done(asking: World, argilla: Address) -> None:
    asking.change(wait_days=3, overlap=1)
    run = asking.build()
    place = Store(run.store.url)
    assert run.store.manifest(run.plan.dataset) is None
    assert not is_due(str(asking.recipe), {}, place)
    assert answer_all(argilla, "annotator", run, min) == BUDGET
    assert is_due(str(asking.recipe), {}, place)
    made = asking.build()
    assert made.store.manifest(made.plan.dataset) is not None
    assert not is_due(str(asking.recipe), {}, place)


def test_without_a_server_the_answers_that_are_here_have_to_do(
    asking: World, argilla: Address, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = asking.build()
    where = (asking.recipe, {}, run.store.url)
    answer_all(argilla, "annotator", run, min)
    assert labelling.pull(*where) == BUDGET
    monkeypatch.setenv("ARGILLA_API_URL", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="no Argilla server answers at"):
        labelling.pull(*where)
    said: list[str] = []
    labels.take_up(*labelling.loaded(*where), said.append)
    assert "no new answers from Argilla" in said[0]
    assert len(labels.answers_so_far(run.plan.recipe, run.store)) == BUDGET


def test_an_answer_starts_the_poll_at_once(asking: World, argilla: Address) -> None:
    asking.change(overlap=1)
    run = asking.build()
    owner = client_of(argilla, "owner")
    # As a process that was killed leaves it.
    left = {"url": "http://127.0.0.1:9/gone", "events": ["record.completed"]}
    owner("POST", "/webhooks", {**left, "description": DESCRIPTION})
    polls: list[int] = []
    polled = threading.Event()

    def poll() -> None:
        polls.append(1)
        polled.set()

    api = connect(argilla.url, next(a.api_key for a in argilla.created if a.role == "owner"))
    with told_of_answers(api, poll, pause=3):
        (hook,) = owner("GET", "/webhooks")["items"]
        assert hook["url"] != left["url"]
        # Who does not know the path is not heard.
        assert httpx.post(hook["url"] + "x", trust_env=False).status_code == 404
        answer_all(argilla, "annotator", run, min)
        assert polled.wait(30)
    assert owner("GET", "/webhooks")["items"] == []
    # Forty answers came in a burst.
    assert len(polls) < 5
