"""Labelling on one machine: start, push, search as the UI searches, pull, memory.

    python benchmarks/labelling.py --records 10000

Questions about two answers of about 1 KB are put into a new Argilla. Times are those of whole
requests over HTTP, by a client that does nothing else meanwhile; memory is that of all processes of
the server, what they share counted once.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from table import write_table

from judging.argilla.api import connect
from judging.argilla.environment import argilla_python
from judging.argilla.labels import ArgillaPeople
from judging.argilla.server import Address, running
from judging.people import Question, question
from preferences.records import Candidate, Prompt, messages_from, prompt_identity

CATEGORIES = ("maths", "code", "writing", "advice")
CHARACTERS = 1000
REPEATS = 50
WINDOW = 10
"""Records that Argilla's UI asks for at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--records", type=int, default=10_000)
    records: int = parser.parse_args().records
    argilla_python(print)
    words = vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "argilla"
        started = time.perf_counter()
        with running(home, port=0) as address:
            first_page(address)
            rows = [("start to the first page, new folder", f"{since(started):.1f} s", "20 s")]
            rows += used(address, words, records)
        started = time.perf_counter()
        with running(home, port=0) as address:
            first_page(address)
            again = f"start to the first page, {records:,} records"
            rows.insert(1, (again, f"{since(started):.1f} s", "20 s"))
    note = f"Times of a search are the median and the 95th percentile of {REPEATS}."
    write_table("labelling", ("what", "measured", "wanted"), rows, note)


def used(address: Address, words: list[str], records: int) -> list[tuple[str, str, str]]:
    """The rows of what happens while it runs."""
    keys = {account.username: account.api_key for account in address.created}
    api = connect(address.url, keys["owner"])
    people = ArgillaPeople(api, "benchmark", lambda ranking: "Prefer the better answer.")
    asked = list(questions(words, records))
    started = time.perf_counter()
    people.ask(asked)
    pushed = since(started)
    started = time.perf_counter()
    people.ask(asked)
    again = since(started)
    rows = [
        (f"push of {records:,}", f"{records / pushed:,.0f} records/s", "100 records/s"),
        ("push of the same again", f"{records / again:,.0f} records/s", ""),
    ]
    (dataset,) = api.get("/me/datasets")["items"]
    draw = random.Random(1)
    annotator, owner = (client(address, keys[name]) for name in ("annotator", "owner"))
    path = f"/me/datasets/{dataset['id']}/records/search"
    searches: dict[str, Callable[[], Any]] = {
        "queue of an annotator": lambda: ask(annotator, path, {"filters": {"and": PENDING}}),
        "a word": lambda: ask(annotator, path, text(draw.choice(words))),
        "two words, pending": lambda: ask(
            annotator, path, {**text(" ".join(draw.sample(words, 2))), "filters": {"and": PENDING}}
        ),
        "a category, sorted": lambda: ask(owner, path, {**CATEGORY, "sort": NEWEST}),
    }
    for name, search in searches.items():
        took = sorted(timed(search) for _ in range(REPEATS))
        shown = f"{statistics.median(took):.0f} ms, {took[int(0.95 * REPEATS)]:.0f} ms"
        rows.append((f"search at {records:,}: {name}", shown, "50 ms"))
    found = ask(annotator, path, {"filters": {"and": PENDING}})
    for record in (item["record"] for item in found["items"]):
        body = {"status": "submitted", "values": {"better": {"value": "a"}}}
        annotator.post(f"/records/{record['id']}/responses", json=body).raise_for_status()
    started = time.perf_counter()
    answers = list(people.answers())
    assert len(answers) == WINDOW
    rows.append((f"pull from {records:,}", f"{records / since(started):,.0f} records/s", ""))
    rows.append(("memory of the server", f"{memory_mb():.0f} MB", "600 MB"))
    return rows


def terms(scope: dict[str, str], value: str) -> dict[str, Any]:
    return {"type": "terms", "scope": scope, "values": [value]}


PENDING = [
    terms({"entity": entity, "property": "status"}, "pending") for entity in ("response", "record")
]
CATEGORY = {
    "filters": {"and": [terms({"entity": "metadata", "metadata_property": "category"}, "code")]}
}
NEWEST = [{"scope": {"entity": "record", "property": "inserted_at"}, "order": "desc"}]


def text(query: str) -> dict[str, Any]:
    return {"query": {"text": {"q": query}}}


def ask(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    query: dict[str, Any] = {"include": ["responses", "suggestions"], "limit": WINDOW}
    return client.post(path, json=body, params=query).raise_for_status().json()


def client(address: Address, key: str) -> httpx.Client:
    headers = {"X-Argilla-Api-Key": key}
    return httpx.Client(base_url=f"{address.url}/api/v1", headers=headers, trust_env=False)


def first_page(address: Address) -> None:
    assert httpx.get(f"{address.url}/", trust_env=False).status_code == 200


def vocabulary() -> list[str]:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(draw.choices(letters, k=n % 7 + 3)) for n in range(5000)]


def questions(words: list[str], number: int) -> Iterator[Question]:
    """Of words as frequent as in a language: the n-th about 1/n as often as the first."""
    draw = random.Random(0)
    weights = [1 / (n + 1) for n in range(len(words))]

    def sentence(characters: int) -> str:
        return " ".join(draw.choices(words, weights, k=characters // 7))

    for n in range(number):
        messages = messages_from(f"{n}: {sentence(180)}?")
        category = CATEGORIES[n % len(CATEGORIES)]
        prompt = Prompt(prompt_identity(messages), messages, "benchmark", category=category)
        candidates = [
            Candidate(f"{n}-{i}", prompt.prompt_id, "m", sentence(CHARACTERS), "complete", i)
            for i in range(2)
        ]
        yield question(prompt, candidates, "ask")


def memory_mb() -> float:
    processes = psutil.Process().children(recursive=True)
    return sum(p.memory_full_info().pss for p in processes) / 1e6


def timed(act: Callable[[], object]) -> float:
    """In milliseconds."""
    started = time.perf_counter()
    act()
    return 1000 * since(started)


def since(started: float) -> float:
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
