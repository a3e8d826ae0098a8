"""Argilla's filters and sort orders as SQL over its own database, attached as `argilla`.

Runs inside the Argilla server: imports nothing of Pairwright.
"""

# What is imported is in Argilla's environment, where types are not checked.
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from argilla_server.search_engine import (
    AndFilter,
    MetadataFilterScope,
    RangeFilter,
    RecordFilterScope,
    ResponseFilterScope,
    SuggestionFilterScope,
)

Clause = tuple[str, list[Any]]
"""SQL about a record `r`, and the values of its question marks."""
PRIME = 2**31 - 1
"""Of numbers below it, products fit into SQLite's 64 bits."""
NANOSECONDS = re.compile(r"(\.\d{6})\d+")


def condition(filter: Any) -> Clause:
    """Whether a record passes a filter."""
    if isinstance(filter, AndFilter):
        parts = [condition(part) for part in filter.filters]
        sql = " AND ".join(f"({sql})" for sql, _ in parts) or "true"
        return sql, [value for _, values in parts for value in values]
    scope = filter.scope
    value, (source, values) = _values(scope)
    if isinstance(scope, RecordFilterScope):
        return _test(filter, value, str(scope.property))
    test, tested = _test(filter, value)
    one = f"EXISTS (SELECT 1 {source} AND {test})"
    by_status = isinstance(scope, ResponseFilterScope) and not scope.question
    if not by_status or isinstance(filter, RangeFilter) or "pending" not in filter.values:
        return one, [*values, *tested]
    # Pending is what is not there: no response, of this user if one is named.
    none = f"NOT EXISTS (SELECT 1 {source})"
    if filter.values == ["pending"]:
        return none, values
    return f"{one} OR {none}", [*values, *tested, *values]


def _test(filter: Any, value: str, column: str | None = None) -> Clause:
    """Whether one value, of a record's column if that is named, passes a filter."""
    if isinstance(filter, RangeFilter):
        bounds = {">=": filter.ge, "<=": filter.le}
        given = {sign: _stored(column, end) for sign, end in bounds.items() if end is not None}
        return " AND ".join(f"{value} {sign} ?" for sign in given), list(given.values())
    wanted = [str(_stored(column, term)) for term in filter.values]
    return f"CAST({value} AS TEXT) IN (SELECT value FROM json_each(?))", [json.dumps(wanted)]


def ordering(sort: Sequence[Any], by_relevance: bool, user_id: Any) -> Clause:
    """The `ORDER BY`; a record that lacks a value comes last, whichever way they are ordered."""
    parts: list[str] = []
    all_values: list[Any] = []
    for order in sort:
        value, (source, values) = _values(order.scope)
        down = order.order == "desc"
        # Several values: the least or the greatest of them, and the mean of responses' numbers.
        one = f"{'max' if down else 'min'}({value})"
        if isinstance(order.scope, ResponseFilterScope):
            one = f"CASE WHEN max(typeof({value})) = 'text' THEN {one} ELSE avg({value}) END"
        key = value if isinstance(order.scope, RecordFilterScope) else f"(SELECT {one} {source})"
        parts.append(f"{key} {'DESC' if down else 'ASC'} NULLS LAST")
        all_values += values
    if not sort and by_relevance:
        parts.append("relevance DESC")
    elif not sort and user_id is not None:
        # The cubes of a number's multiples jump about, and every user's number is another.
        multiple = f"(r.rowid * {user_id.int % (PRIME - 1) + 1} % {PRIME})"
        parts.append(f"({multiple} * {multiple} % {PRIME}) * {multiple} % {PRIME}")
    return ", ".join([*parts, "r.inserted_at", "r.id"]), all_values


def _values(scope: Any) -> tuple[str, Clause]:
    """An expression for a value that the record has in this scope, and where it ranges over all."""
    if isinstance(scope, RecordFilterScope):
        return f"r.{scope.property!s}", ("WHERE true", [])
    if isinstance(scope, MetadataFilterScope):
        path = json_path(scope.metadata_property)
        return "each.value", ("FROM json_each(r.metadata, ?) each WHERE true", [path])
    if isinstance(scope, SuggestionFilterScope):
        source = """FROM argilla.suggestions s JOIN argilla.questions q ON q.id = s.question_id{}
            WHERE s.record_id = r.id AND q.name = ?"""
        if scope.property in ("agent", "type"):
            return f"s.{scope.property}", (source.format(""), [scope.question])
        column = "score" if scope.property == "score" else "value"
        return "each.value", (source.format(f", json_each(s.{column}) each"), [scope.question])
    if not isinstance(scope, ResponseFilterScope):
        raise ValueError(f"no such scope: {scope}")
    by_user = " AND p.user_id = ?" if scope.user else ""
    user = [scope.user.id.hex] if scope.user else []
    if scope.question:
        body = f"""FROM argilla.responses p, json_each(p."values", ?) each
            WHERE p.record_id = r.id{by_user}"""
        return "each.value", (body, [f"{json_path(scope.question)}.value", *user])
    if scope.property != "status":
        raise ValueError(f"responses have no property {scope.property!r}")
    return "p.status", (f"FROM argilla.responses p WHERE p.record_id = r.id{by_user}", user)


def _stored(column: str | None, given: Any) -> Any:
    """A bound or term for a record's column, as the database holds it; others as they are."""
    if column == "id":
        with contextlib.suppress(ValueError):
            return UUID(str(given)).hex
    if column in ("inserted_at", "updated_at"):
        with contextlib.suppress(ValueError):
            if isinstance(given, str):
                moment = datetime.fromisoformat(NANOSECONDS.sub(r"\1", given))
            else:
                moment = datetime.fromtimestamp(given / 1000, UTC)
            if moment.tzinfo is not None:
                moment = moment.astimezone(UTC)
            return moment.strftime("%Y-%m-%d %H:%M:%S.%f")
    return given


def json_path(name: str) -> str:
    """The JSON path of a metadata property or question; their names hold no quotes."""
    return f'$."{name}"'
