"""Argilla's search engine on SQLite, in place of Elasticsearch.

Runs inside the Argilla server, so it imports nothing of Pairwright. Only the text index is its own,
in `search.db`; everything else is read from Argilla's database, so it cannot say anything else than
that. Argilla commits before it calls its engine.
"""

# What is imported is in Argilla's environment, where types are not checked.
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import text_index
from argilla_server.enums import MetadataPropertyType, SimilarityOrder
from argilla_server.search_engine import (
    FloatMetadataMetrics,
    IntegerMetadataMetrics,
    SearchEngine,
    SearchResponseItem,
    SearchResponses,
    TermsMetrics,
    TextQuery,
)
from argilla_server.settings import settings
from record_filters import (
    Clause,
    condition,
    json_path,
    ordering,
)
from text_query import (
    match_expression,
)


@SearchEngine.register("sqlite")
class SqliteSearchEngine(SearchEngine):  # type: ignore[misc]
    """One is made for every request."""

    def __init__(self, home: Path) -> None:
        self._home = home

    @classmethod
    async def new_instance(cls) -> SqliteSearchEngine:
        return cls(Path(settings.home_path))

    async def close(self) -> None:
        pass

    async def ping(self) -> bool:
        return bool(await self._read(("SELECT 1", [])))

    async def info(self) -> dict[str, Any]:
        return {"name": "sqlite", "version": {"number": sqlite3.sqlite_version}}

    # The text index.

    async def create_index(self, dataset: Any) -> None:
        await asyncio.to_thread(text_index.create_index, self._home, dataset.id.hex)

    async def delete_index(self, dataset: Any) -> None:
        await asyncio.to_thread(text_index.delete_index, self._home, dataset.id.hex)

    async def index_records(self, dataset: Any, records: Iterable[Any]) -> None:
        ids = [record.id.hex for record in records]
        await asyncio.to_thread(text_index.add_records, self._home, dataset.id.hex, ids)

    async def delete_records(self, dataset: Any, records: Iterable[Any]) -> None:
        ids = [record.id.hex for record in records]
        await asyncio.to_thread(text_index.forget_records, self._home, dataset.id.hex, ids)

    # What is read from Argilla's database needs no telling.

    async def configure_metadata_property(self, dataset: Any, metadata_property: Any) -> None:
        pass

    async def configure_index_vectors(self, vector_settings: Any) -> None:
        pass

    async def partial_record_update(self, record: Any, **update: Any) -> None:
        pass

    async def update_record_response(self, response: Any) -> None:
        pass

    async def delete_record_response(self, response: Any) -> None:
        pass

    async def update_record_suggestion(self, suggestion: Any) -> None:
        pass

    async def delete_record_suggestion(self, suggestion: Any) -> None:
        pass

    # Questions.

    async def search(
        self,
        dataset: Any,
        query: TextQuery | str | None = None,
        filter: Any = None,
        sort: Sequence[Any] | None = None,
        offset: int = 0,
        limit: int = 100,
        user_id: Any = None,
    ) -> SearchResponses:
        """The records found, in the order of `sort`.

        Without one they come by relevance if there is a query, shuffled in the same way every time
        for a user who is named, and by their age otherwise.
        """
        found = _found(dataset, query, filter)
        if found is None:
            return SearchResponses(items=[], total=0)
        (body, values), relevance = found
        order, order_values = ordering(sort or [], bool(query), user_id)
        (((total,),), rows) = await self._read(
            (f"SELECT count(*) {body}", values),
            (
                f"SELECT r.id, {relevance} AS relevance {body} ORDER BY {order} LIMIT ? OFFSET ?",
                [*values, *order_values, limit, offset],
            ),
        )
        items = [SearchResponseItem(record_id=UUID(id_), score=score) for id_, score in rows]
        return SearchResponses(items=items, total=total)

    async def similarity_search(
        self,
        dataset: Any,
        vector_settings: Any,
        value: list[float] | None = None,
        record: Any = None,
        query: TextQuery | str | None = None,
        filter: Any = None,
        max_results: int = 100,
        order: SimilarityOrder = SimilarityOrder.most_similar,
        threshold: float | None = None,
    ) -> SearchResponses:
        """The records nearest to a vector, or to a record, which is not among them.

        The score is (1 + cosine) / 2, or (1 - cosine) / 2 where the least similar are looked for.
        """
        if bool(value) == bool(record):
            raise ValueError("either a vector or a record has to be given, and not both")
        target = value or record.vector_value_by_vector_settings(vector_settings)
        if not target:
            raise ValueError("the record has no such vector")
        found = _found(dataset, query, filter)
        if found is None:
            return SearchResponses(items=[], total=0)
        (body, values), _ = found
        query_of_vectors = (
            f"""SELECT v.record_id, v.value FROM argilla.vectors v
            WHERE v.vector_settings_id = ? AND v.record_id <> ?
            AND v.record_id IN (SELECT r.id {body}) ORDER BY v.record_id""",
            [vector_settings.id.hex, record.id.hex if record else "", *values],
        )
        (vectors,) = await self._read(query_of_vectors)
        sign = -1 if order == SimilarityOrder.least_similar else 1
        scores = await asyncio.to_thread(_similarity, target, [v for _, v in vectors], sign)
        best = np.argsort(-scores, kind="stable")[:max_results]
        items = [
            SearchResponseItem(record_id=UUID(vectors[i][0]), score=float(scores[i]))
            for i in best
            if threshold is None or scores[i] >= threshold
        ]
        return SearchResponses(items=items, total=len(items))

    async def get_dataset_progress(self, dataset: Any) -> dict[str, int]:
        """How many records there are, and how many of each status."""
        return await self._counts(
            "SELECT status, count(*) FROM argilla.records WHERE dataset_id = ? GROUP BY status",
            [dataset.id.hex],
        )

    async def get_dataset_user_progress(self, dataset: Any, user: Any) -> dict[str, int]:
        """How many responses a user gave, and how many of each status."""
        return await self._counts(
            """SELECT p.status, count(*) FROM argilla.responses p
            JOIN argilla.records r ON r.id = p.record_id
            WHERE r.dataset_id = ? AND p.user_id = ? GROUP BY p.status""",
            [dataset.id.hex, user.id.hex],
        )

    async def compute_metrics_for(self, metadata_property: Any) -> Any:
        """The terms of a metadata property with their counts, or its least and greatest number."""
        body = """FROM argilla.records r, json_each(r.metadata, ?) each
            WHERE r.dataset_id = ? AND each.value IS NOT NULL"""
        values = [json_path(metadata_property.name), metadata_property.dataset_id.hex]
        if metadata_property.type == MetadataPropertyType.terms:
            terms = f"""SELECT CAST(each.value AS TEXT) AS term, count(DISTINCT r.id) AS records
                {body} GROUP BY term ORDER BY records DESC, term"""
            (rows,) = await self._read((terms, values))
            counts = [TermsMetrics.TermCount(term=term, count=count) for term, count in rows]
            return TermsMetrics(total=sum(count for _, count in rows), values=counts)
        ((ends,),) = await self._read((f"SELECT min(each.value), max(each.value) {body}", values))
        if metadata_property.type == MetadataPropertyType.integer:
            return IntegerMetadataMetrics(min=ends[0], max=ends[1])
        return FloatMetadataMetrics(min=ends[0], max=ends[1])

    async def _counts(self, sql: str, values: list[Any]) -> dict[str, int]:
        (rows,) = await self._read((sql, values))
        counts = dict(rows)
        return {"total": sum(counts.values()), **counts}

    async def _read(self, *queries: Clause) -> list[Any]:
        """The rows of each query, all of the same moment."""

        def read() -> list[Any]:
            with text_index.connected(self._home) as connection:
                connection.execute("BEGIN")
                return [connection.execute(sql, values).fetchall() for sql, values in queries]

        return await asyncio.to_thread(read)


def _found(dataset: Any, query: TextQuery | str | None, filter: Any) -> tuple[Clause, str] | None:
    """The `FROM … WHERE …` of the records that match, and the expression of their relevance.

    None if the query has no word: it finds nothing.
    """
    passes, values = condition(filter) if filter else ("true", [])
    if not query:
        body = f"FROM argilla.records r WHERE r.dataset_id = ? AND ({passes})"
        return (body, [dataset.id.hex, *values]), "NULL"
    asked = TextQuery(q=query) if isinstance(query, str) else query
    expression = match_expression(asked.q, asked.field)
    if expression is None:
        return None
    # CROSS JOIN keeps this order: from the few rows that match to their records.
    table = text_index.table_of(dataset.id.hex)
    body = f"""FROM {table} t CROSS JOIN documents d CROSS JOIN argilla.records r
        WHERE t.{table} MATCH ? AND d.number = t.rowid AND r.id = d.record_id AND ({passes})"""
    return (body, [expression, *values]), "-t.rank"


def _similarity(target: Sequence[float], vectors: Sequence[str], sign: int) -> Any:
    """(1 + sign · cosine) / 2 of each vector, which is JSON; 1/2 where one of them is zero."""
    if not vectors:
        return np.zeros(0)
    matrix = np.array([np.fromstring(v[1:-1], sep=",") for v in vectors])
    point = np.asarray(target, dtype=float)
    norms = np.linalg.norm(matrix, axis=1) * np.linalg.norm(point)
    cosine = np.divide(matrix @ point, norms, out=np.zeros(len(matrix)), where=norms > 0)
    return (1 + sign * cosine) / 2
