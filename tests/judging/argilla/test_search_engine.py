"""The search engine against a look through all records, in the running server."""

from __future__ import annotations

import itertools
import math
import random
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from judging.argilla.server import Address
from tests.judging.argilla.argilla_api import TEXT, Client, Dataset, create_dataset, labels, rating
from tests.judging.argilla.conftest import client_of
from tests.judging.argilla.records import (
    LABELS,
    MIN_SUBMITTED,
    TOPICS,
    USERS,
    Row,
    Term,
    fits,
    passes,
    random_row,
    random_term,
    sort_key,
    sorted_keys,
)

METADATA = {"topic": "terms", "tags": "terms", "length": "integer", "margin": "float"}
STATUS = {"entity": "response", "property": "status"}


def metadata(name: str) -> dict[str, str]:
    return {"entity": "metadata", "metadata_property": name}


def suggestion(question: str, part: str = "value") -> dict[str, str]:
    return {"entity": "suggestion", "question": question, "property": part}


def response(question: str) -> dict[str, str]:
    return {"entity": "response", "question": question}


def record(part: str) -> dict[str, str]:
    return {"entity": "record", "property": part}


SORTS = [
    *(record(part) for part in ("inserted_at", "updated_at", "status", "external_id")),
    *(metadata(name) for name in METADATA),
    *(suggestion(question) for question in ("better", "stars")),
    suggestion("stars", "score"),
    *(response(question) for question in ("better", "stars")),
]


@pytest.fixture(scope="module")
def users(argilla: Address) -> dict[str, Client]:
    return {name: client_of(argilla, name) for name in USERS}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    rng = random.Random(2026)
    return [random_row(rng, number) for number in range(200)]


@pytest.fixture(scope="module")
def dataset(users: dict[str, Client], rows: list[Row]) -> Dataset:
    """All rows in Argilla; what it made of them (ids, times) is noted in the rows."""
    made = new_dataset(users["owner"])
    ids = {name: client("GET", "/me")["id"] for name, client in users.items()}
    for start in range(0, len(rows), 100):
        some = rows[start : start + 100]
        for row, id_ in zip(some, made.add([item(made, row, ids) for row in some]), strict=True):
            row.id = id_
    for held in made.client("GET", f"/datasets/{made.id}/records", limit=1000)["items"]:
        (row,) = (row for row in rows if row.id == held["id"])
        row.inserted_at, row.updated_at = held["inserted_at"], held["updated_at"]
    return made


def new_dataset(client: Client) -> Dataset:
    return create_dataset(
        client,
        f"contract-{uuid.uuid4().hex[:8]}",
        {"prompt": TEXT, "answer": TEXT, "talk": {"type": "chat"}},
        {"better": labels(*LABELS), "stars": rating(5)},
        METADATA,
        {"meaning": 4},
        MIN_SUBMITTED,
    )


def item(dataset: Dataset, row: Row, user_ids: dict[str, str]) -> dict[str, Any]:
    """A row as the bulk endpoint takes it."""
    suggestions = [
        {"question_id": dataset.questions[question], **held}
        for question, held in row.suggestions.items()
    ]
    responses = [
        {
            "user_id": user_ids[name],
            "status": held["status"],
            "values": {question: {"value": value} for question, value in held["values"].items()},
        }
        for name, held in row.responses.items()
    ]
    return {
        "fields": row.fields,
        "metadata": row.metadata,
        "external_id": row.external_id,
        "suggestions": suggestions,
        "responses": responses,
        **({"vectors": {"meaning": row.vector}} if row.vector else {}),
    }


def random_filter(rng: random.Random, rows: Sequence[Row]) -> dict[str, Any]:
    def terms(scope: dict[str, str], values: Sequence[Any]) -> dict[str, Any]:
        chosen = rng.sample(list(values), rng.randint(1, len(values)))
        return {"type": "terms", "scope": scope, "values": [str(value) for value in chosen]}

    def between(scope: dict[str, str], low: float, high: float) -> dict[str, Any]:
        ends = sorted((rng.uniform(low, high), rng.uniform(low, high)))
        bounds = dict(zip(("ge", "le"), ends, strict=True))
        bounds.pop(rng.choice(("ge", "le", "neither")), None)
        return {"type": "range", "scope": scope, **bounds}

    return rng.choice(
        [
            terms(metadata("topic"), TOPICS),
            terms(metadata("tags"), TOPICS),
            terms(metadata("length"), range(-3, 6)),
            between(metadata("length"), -4, 13),
            between(metadata("margin"), -2, 2),
            terms(record("status"), ("pending", "completed")),
            terms(record("external_id"), [row.external_id for row in rows[:40]]),
            terms(record("id"), [row.id for row in rows[:40]]),
            terms(STATUS, ("pending", "draft", "submitted", "discarded")),
            terms(response("better"), LABELS),
            terms(response("stars"), range(1, 6)),
            between(response("stars"), 1, 5),
            terms(suggestion("better"), LABELS),
            terms(suggestion("better", "agent"), ("judge", "rule", "nobody")),
            between(suggestion("stars", "score"), 0, 1),
            between(suggestion("stars"), 1, 5),
        ]
    )


@pytest.mark.parametrize("seed", range(60))
def test_a_search_finds_what_a_look_through_all_records_finds(
    dataset: Dataset, rows: list[Row], users: dict[str, Client], seed: int
) -> None:
    rng = random.Random(seed)
    query = [[random_term(rng) for _ in range(rng.randint(1, 2))] for _ in range(rng.randint(1, 2))]
    text = " | ".join(" ".join(map(str, alternative)) for alternative in query)
    only = rng.choice((None, "prompt", "answer", "talk"))
    text_asked = rng.random() < 0.5
    filters = [random_filter(rng, rows) for _ in range(rng.randint(0, 3))]
    scope, order = rng.choice(SORTS), rng.choice(("asc", "desc"))
    name = rng.choice((None, *USERS))
    expected = [
        row
        for row in rows
        if all(passes(row, condition, name) for condition in filters)
        and (not text_asked or fits(row, query, only))
    ]

    ids, total = dataset.search(
        text if text_asked else None,
        only,
        filters,
        [(scope, order)],
        user=users[name] if name else None,
    )

    told = f"{text if text_asked else None!r} in {only}, {filters}, by {name}"
    assert sorted(ids) == sorted(row.id for row in expected), told
    assert total == len(expected)
    by_id = {row.id: row for row in rows}
    keys = [sort_key(by_id[id_], scope, order, name) for id_ in ids]
    assert keys == sorted_keys(expected, scope, order, name), f"{scope} {order} by {name}"


@pytest.mark.parametrize("name", [None, "annotator"])
@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("scope", SORTS, ids=lambda scope: "-".join(scope.values()))
def test_records_are_sorted_by_anything_and_what_lacks_it_comes_last(
    dataset: Dataset,
    rows: list[Row],
    users: dict[str, Client],
    scope: dict[str, str],
    order: str,
    name: str | None,
) -> None:
    ids, _ = dataset.search(sort=[(scope, order)], user=users[name] if name else None)
    by_id = {row.id: row for row in rows}
    keys = [sort_key(by_id[id_], scope, order, name) for id_ in ids]
    assert keys == sorted_keys(rows, scope, order, name)


@pytest.mark.parametrize("seed", range(60))
def test_text_is_found_by_words_phrases_beginnings_and_what_is_missing(
    dataset: Dataset, rows: list[Row], seed: int
) -> None:
    rng = random.Random(1000 + seed)
    query = [[random_term(rng) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(1, 3))]
    only = rng.choice((None, "prompt", "answer", "talk"))
    text = " | ".join(" ".join(map(str, alternative)) for alternative in query)
    hits = dataset.hits(text, only)
    found = {hit["record"]["id"] for hit in hits["items"]}
    expected = {row.id for row in rows if fits(row, query, only)}
    assert found == expected, f"{text!r} in {only}"
    assert hits["total"] == len(expected)
    scores = [hit["query_score"] for hit in hits["items"]]
    assert scores == sorted(scores, reverse=True)


def test_the_oracle_of_text_queries_is_no_yes_man(dataset: Dataset, rows: list[Row]) -> None:
    """Some queries of the tests above find nothing, some everything, most a part."""
    counts = []
    for seed in range(60):
        rng = random.Random(1000 + seed)
        query = [[random_term(rng) for _ in range(rng.randint(1, 3))]]
        counts.append(sum(fits(row, query, None) for row in rows))
    assert sum(0 < count < len(rows) for count in counts) > 0
    assert len(set(counts)) > 20


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cafe", {"café au lait", "a cafe"}),
        ("CAFÉ", {"café au lait", "a cafe"}),
        ('"au lait"', {"café au lait"}),
        ("lait au", {"café au lait"}),
        ("caf* -lait", {"a cafe"}),
        ("lait | tea", {"café au lait", "green tea"}),
        ("green-tea", {"green tea"}),
        ("-cafe", {"green tea", "今日は雨です", "हिन्दी भाषा"}),
        ("雨", {"今日は雨です"}),
        ("今日", {"今日は雨です"}),
        ("日今", set()),
        ("हिन्दी", {"हिन्दी भाषा"}),
        ("हि", set()),
        ("?!", set()),
        ("nowhere", set()),
    ],
)
def test_words_in_many_scripts(owner: Client, text: str, found: set[str], cafe: Dataset) -> None:
    items = cafe.hits(text)["items"]
    assert {hit["record"]["fields"]["prompt"] for hit in items} == found


@pytest.fixture(scope="module")
def cafe(owner: Client) -> Dataset:
    made = new_dataset(owner)
    texts = ("café au lait", "a cafe", "green tea", "今日は雨です", "हिन्दी भाषा")
    made.add([{"fields": {"prompt": text}} for text in texts])
    return made


HOSTILE = (
    *('"', '""', "-", "*", "|", "||", "- | -", "()", "a AND", "NEAR(red blue, 2)", "^red", "{x}:y"),
    *("prompt:red", "red\0blue", "red \ufffd", "'; DROP TABLE documents; --", '"red" * "'),
    *("\ue000", "%", "\\", "<script>", "{{ red }}", "red " * 2000, "-red " * 500, "| red" * 500),
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_query_breaks_the_search(dataset: Dataset, rows: list[Row], text: str) -> None:
    for only in (None, "prompt"):
        ids, total = dataset.search(text, only)
        assert len(ids) == total <= len(rows)


def test_hostile_records_are_kept_and_found(owner: Client) -> None:
    made = new_dataset(owner)
    texts = ["needle \ufffd", "needle \ue000", "needle\n\x1b[31m", 'needle "; DROP TABLE x']
    texts.append("x" * 200_000 + " needle")
    made.add([{"fields": {"prompt": text}, "metadata": {"topic": text[:50]}} for text in texts])
    assert made.search("needle")[1] == len(texts)
    path = f"/metadata-properties/{made.metadata['topic']}/metrics"
    assert owner("GET", path)["total"] == len(texts)
    asked = {"type": "terms", "scope": metadata("topic"), "values": [texts[3]]}
    assert made.search(filters=[asked])[1] == 1


def test_pages_follow_each_other_without_gap_or_repeat(
    dataset: Dataset, rows: list[Row], users: dict[str, Client]
) -> None:
    for sort in ([], [(metadata("topic"), "desc")]):
        for user in (None, users["annotator"]):
            whole, total = dataset.search(sort=sort, user=user)
            pages = [
                dataset.search(sort=sort, user=user, offset=start, limit=30)
                for start in range(0, 240, 30)
            ]
            assert [id_ for page, _ in pages for id_ in page] == whole
            assert {count for _, count in pages} == {total} == {len(rows)}


def test_without_a_sort_each_user_has_an_order_of_their_own_that_stays(
    dataset: Dataset, rows: list[Row], users: dict[str, Client]
) -> None:
    orders = {name: dataset.search(user=client)[0] for name, client in users.items()}
    again = {name: dataset.search(user=client)[0] for name, client in users.items()}
    assert orders == again
    assert len({tuple(order) for order in orders.values()}) == len(USERS)
    age = {row.id: number for number, row in enumerate(rows)}
    for order in orders.values():
        # Of two neighbours the younger comes first about as often as not: 100 ± 4 standard errors.
        falls = sum(age[a] > age[b] for a, b in itertools.pairwise(order))
        assert abs(falls - 99.5) < 4 * math.sqrt(200 / 12)
    assert dataset.search()[0] == [row.id for row in rows]  # the oldest first, for programs


def test_progress_counts_records_by_status_and_answers_by_user(
    dataset: Dataset, rows: list[Row], users: dict[str, Client]
) -> None:
    progress = dataset.client("GET", f"/datasets/{dataset.id}/progress")
    expected = Counter(row.status for row in rows)
    assert progress["total"] == len(rows)
    assert {"pending": progress["pending"], "completed": progress["completed"]} == expected
    for name, client in users.items():
        given = Counter(row.responses[name]["status"] for row in rows if name in row.responses)
        pending = len(rows) - sum(given.values())
        metrics = client("GET", f"/me/datasets/{dataset.id}/metrics")["responses"]
        assert metrics == {"total": len(rows), "pending": pending, **given}


def test_metrics_of_metadata_are_terms_with_counts_or_the_ends_of_the_range(
    dataset: Dataset, rows: list[Row]
) -> None:
    def metrics(name: str) -> Any:
        return dataset.client("GET", f"/metadata-properties/{dataset.metadata[name]}/metrics")

    for name in ("topic", "tags"):
        held = [row.metadata.get(name, []) for row in rows]
        counts = Counter(
            term for value in held for term in (value if isinstance(value, list) else [value])
        )
        told = metrics(name)
        assert told["total"] == counts.total()
        assert {value["term"]: value["count"] for value in told["values"]} == counts
        sizes = [value["count"] for value in told["values"]]
        assert sizes == sorted(sizes, reverse=True)
    for name in ("length", "margin"):
        numbers = [row.metadata[name] for row in rows if name in row.metadata]
        told = metrics(name)
        assert (told["min"], told["max"]) == (min(numbers), max(numbers))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("order", ["most_similar", "least_similar"])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("by", ["record", "value"])
def test_the_nearest_vectors_come_first(
    dataset: Dataset, rows: list[Row], order: str, filtered: bool, by: str
) -> None:
    with_vector = [row for row in rows if row.vector]
    target = with_vector[7]
    assert target.vector is not None
    given = {"record_id": target.id} if by == "record" else {"value": target.vector}
    only = {"type": "terms", "scope": record("status"), "values": ["pending"]}
    hits = dataset.hits(
        filters=[only] if filtered else [],
        vector={"name": "meaning", "order": order, **given},
        limit=50,
    )
    sign = 1 if order == "most_similar" else -1
    scores = sorted(
        (
            (1 + sign * cosine(row.vector, target.vector)) / 2
            for row in with_vector
            if row.vector
            and not (filtered and row.status != "pending")
            and not (by == "record" and row is target)
        ),
        reverse=True,
    )[:50]
    assert [hit["query_score"] for hit in hits["items"]] == pytest.approx(scores)
    by_id = {row.id: row for row in rows}
    for hit in hits["items"]:
        vector = by_id[hit["record"]["id"]].vector
        assert vector is not None
        assert hit["query_score"] == pytest.approx((1 + sign * cosine(vector, target.vector)) / 2)


def test_text_and_vector_are_asked_for_together(dataset: Dataset, rows: list[Row]) -> None:
    target = next(row for row in rows if row.vector)
    ids, _ = dataset.search("red", vector={"name": "meaning", "value": target.vector})
    expected = {row.id for row in rows if row.vector and fits(row, [[Term(("red",))]], None)}
    assert set(ids) == expected


def test_what_changes_is_found_as_it_is_now(users: dict[str, Client]) -> None:
    owner, annotator = users["owner"], users["annotator"]
    made = new_dataset(owner)
    first, second, third = made.add([{"fields": {"prompt": f"number {n}"}} for n in "123"])

    # A text, a deleted record.
    owner("PATCH", f"/records/{first}", {"metadata": {"topic": "code"}})
    upsert = [{"id": second, "fields": {"prompt": "rewritten"}}]
    owner("PUT", f"/datasets/{made.id}/records/bulk", {"items": upsert})
    assert made.search("rewritten")[0] == [second]
    assert made.search("number")[0] == [first, third]
    assert made.search(filters=[{"type": "terms", "scope": metadata("topic"), "values": ["code"]}])[
        0
    ] == [first]
    owner("DELETE", f"/datasets/{made.id}/records", ids=third)
    assert made.search("number")[0] == [first]
    assert made.search()[1] == 2

    # An answer leaves the queue of who gave it, and comes back when it is withdrawn.
    queue = [
        {"type": "terms", "scope": STATUS, "values": ["pending"]},
        {"type": "terms", "scope": record("status"), "values": ["pending"]},
    ]
    values = {"better": {"value": "tie"}, "stars": {"value": 3}}
    body = {"status": "submitted", "values": values}
    answer = annotator("POST", f"/records/{first}/responses", body)
    assert made.search(filters=queue, user=annotator)[0] == [second]
    assert set(made.search(filters=queue, user=owner)[0]) == {first, second}
    owner("POST", f"/records/{first}/responses", body)
    assert made.search(filters=queue, user=users["admin"])[0] == [second]  # two answers complete it
    annotator("PUT", f"/responses/{answer['id']}", {**body, "status": "draft"})
    assert set(made.search(filters=queue, user=users["admin"])[0]) == {first, second}
    drafts = [{"type": "terms", "scope": STATUS, "values": ["draft"]}]
    assert made.search(filters=drafts, user=annotator)[0] == [first]
    annotator("DELETE", f"/responses/{answer['id']}")
    assert set(made.search(filters=queue, user=annotator)[0]) == {first, second}

    # A suggestion comes and goes.
    suggested = [{"type": "terms", "scope": suggestion("better"), "values": ["tie"]}]
    body = {"question_id": made.questions["better"], "value": "tie"}
    held = owner("PUT", f"/records/{second}/suggestions", body)
    assert made.search(filters=suggested)[0] == [second]
    owner("DELETE", f"/records/{second}/suggestions", ids=held["id"])
    assert made.search(filters=suggested)[0] == []

    owner("DELETE", f"/datasets/{made.id}")
    assert owner("GET", "/version")["version"] == "2.8.0"
