"""Many people at once, and a server killed on the way: every answer arrives exactly once."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest

from judging.argilla.labels import ArgillaPeople
from judging.argilla.server import Address, running
from judging.people import Question
from preferences.errors import InputError
from preferences.records import Dropped, Judgment
from tests.judging.argilla.labellers import (
    Labeller,
    Record,
    about_qualities,
    new_name,
    pair_values,
    people_at,
)

T = TypeVar("T")
LABELS = {"a": "first", "tie": "tie", "b": "second"}


def test_a_crowd_answers_and_everything_arrives_once(argilla: Address) -> None:
    asked = questions(12)
    people = people_at(argilla, name := new_name())
    people.ask(asked)
    crowd = [Labeller(argilla) for _ in range(5)]
    answer_in_turns(crowd, name, asked, lambda answered: None)
    check(people, crowd, asked)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_people_answer_a_thousand_questions_while_the_server_is_killed_twice(
    environment: Path, tmp_path: Path
) -> None:
    asked = questions(1000)
    with killable(tmp_path / "home") as server:
        people = people_at(server.address, name := new_name())
        people.ask(asked)
        crowd = [Labeller(server.address) for _ in range(20)]
        kills = [1000, 2000]

        def kill_twice(answered: int) -> None:
            if kills and answered >= kills[0]:
                kills.pop(0)
                server.kill_and_restart()

        # Whoever pulls meanwhile waits for the server as those who answer do.
        with pulling(people) as pulled:
            answer_in_turns(crowd, name, asked, kill_twice)
        assert kills == []
        assert pulled == sorted(pulled)
        check(people, crowd, asked)


@pytest.mark.slow
def test_a_push_goes_on_when_the_server_comes_back(environment: Path, tmp_path: Path) -> None:
    asked = questions(600)
    with killable(tmp_path / "home") as server:
        people = people_at(server.address, new_name())
        with ThreadPoolExecutor(1) as pool:
            pushed = pool.submit(people.ask, asked)
            assert within(60, lambda: 0 < server.records() < 600)
            server.kill_and_restart()
            pushed.result(300)
        assert server.records() == 600
        assert people.waiting() == 3 * 600


@pytest.mark.slow
def test_a_push_that_was_killed_with_the_server_is_completed_by_the_next(
    environment: Path, tmp_path: Path
) -> None:
    asked = questions(600)
    with killable(tmp_path / "home") as server:
        name = new_name()
        process = os.fork()
        if process == 0:
            try:
                people_at(server.address, name).ask(asked)
            finally:
                os._exit(0)
        assert within(60, lambda: 0 < server.records() < 600)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        server.kill_and_restart()
        assert 0 < server.records() < 600
        people = people_at(server.address, name)
        people.ask(asked)
        assert server.records() == 600
        assert people.waiting() == 3 * 600


def questions(number: int) -> list[Question]:
    """Which of the answers is better nobody asks: what each person says is drawn."""
    return [about_qualities(n, [1, 2], "calibrate") for n in range(number)]


def drawn(annotator: str, question_id: str) -> str:
    """What somebody says of a question."""
    digest = hashlib.sha256(f"{annotator} {question_id}".encode()).digest()
    return list(LABELS)[digest[0] % 3]


def answer_in_turns(
    crowd: Sequence[Labeller], recipe: str, asked: Sequence[Question], after: Callable[[int], None]
) -> None:
    """Each question is answered by the next three, all at the same time; `after` each answer."""
    (dataset,) = crowd[0].datasets(recipe).values()
    records = {record["external_id"]: record for record in crowd[0].queue(dataset)}
    assert len(records) == len(asked)
    work: list[list[Record]] = [[] for _ in crowd]
    for n, question in enumerate(asked):
        for turn in range(3):
            work[(3 * n + turn) % len(crowd)].append(records[question.question_id])
    lock, answered = threading.Lock(), [0]

    def label(number: int) -> None:
        labeller = crowd[number]
        random.Random(number).shuffle(work[number])
        for record in work[number]:
            values = pair_values(drawn(labeller.name, record["external_id"]))
            until_it_works(partial(send, labeller, record, values))
            with lock:
                answered[0] += 1
                after(answered[0])

    with ThreadPoolExecutor(len(crowd)) as pool:
        list(pool.map(label, range(len(crowd))))


def send(labeller: Labeller, record: Record, values: Record) -> None:
    """Submit an answer, as often as it takes; one whose receipt was lost is there already."""
    try:
        labeller.answer(record, values)
    except AssertionError as refusal:
        if "409" not in str(refusal):
            raise


def until_it_works(ask: Callable[[], T]) -> T:
    """Somebody whose page shows an error tries again."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return ask()
        except (httpx.TransportError, AssertionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def check(people: ArgillaPeople, crowd: Sequence[Labeller], asked: Sequence[Question]) -> None:
    """All answers have arrived, once each, and say what was said."""
    found = list(people.answers())
    assert [a for a in found if isinstance(a, Dropped)] == []
    judgments = [a for a in found if isinstance(a, Judgment)]
    assert len(judgments) == len({j.judgment_id for j in judgments}) == 3 * len(asked)
    expected = {
        (labeller.name, question.about.shown): drawn(labeller.name, question.question_id)
        for n, question in enumerate(asked)
        for labeller in (crowd[(3 * n + turn) % len(crowd)] for turn in range(3))
    }
    assert {(j.annotator, j.candidate_ids): j.verdict for j in judgments} == {
        key: LABELS[said] for key, said in expected.items()
    }
    assert people.waiting() == 0


@contextmanager
def pulling(people: ArgillaPeople) -> Iterator[list[int]]:
    """Pulls all the while; how many answers there were each time."""
    over, counts = threading.Event(), list[int]()

    def pull() -> None:
        while not over.is_set():
            counts.append(len(list(people.answers())))

    with ThreadPoolExecutor(1) as pool:
        pulled = pool.submit(pull)
        try:
            yield counts
        finally:
            over.set()
            pulled.result(300)


class Killable:
    """A server of its own, on a port that stays the same."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._run: AbstractContextManager[Address] = running(home, port=0)
        self.address = self._run.__enter__()
        self._port = int(self.address.url.rpartition(":")[2])

    def kill_and_restart(self) -> None:
        """Kill the server without a warning, and start it again."""
        me = psutil.Process()
        (server,) = (
            p
            for p in me.children()
            if "launch.py" in str(p.cmdline()) and str(self.home) in p.cwd()
        )
        server.kill()
        self.stop()
        time.sleep(1)
        self._run = running(self.home, port=self._port)
        deadline = time.monotonic() + 20
        while True:
            try:
                self._run.__enter__()
                return
            except InputError:  # What the killed one left may hold the port for a moment.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
                self._run = running(self.home, port=self._port)

    def stop(self) -> None:
        self._run.__exit__(None, None, None)

    def records(self) -> int:
        """How many are in the database."""
        with closing(sqlite3.connect(self.home / "argilla.db", timeout=30)) as connection:
            ((count,),) = connection.execute("SELECT count(*) FROM records")
            return int(count)


@contextmanager
def killable(home: Path) -> Iterator[Killable]:
    server = Killable(home)
    try:
        yield server
    finally:
        server.stop()


def within(seconds: float, true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
