"""Records through Arrow and back."""

from __future__ import annotations

import io
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preferences.records import (
    Candidate,
    Message,
    Prompt,
    Record,
    from_table,
    messages_from,
    prompt_identity,
    schema_of,
    to_table,
)
from tests.preferences.strategies import mended, records

KINDS = get_args(Record)


@pytest.mark.parametrize("record", KINDS)
def test_every_record_survives_parquet_whole(record: type[Any]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.lists(records(record), max_size=5))
    def survives(rows: list[Any]) -> None:
        stream = io.BytesIO()
        pq.write_table(to_table(record, rows), stream)
        assert from_table(record, pq.read_table(stream)) == [mended(row) for row in rows]

    survives()


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    answer = Candidate("c", "p", "m", "ok \ud83d end", "complete")
    (read,) = from_table(Candidate, to_table(Candidate, [answer]))
    assert read.response == "ok ? end"


@pytest.mark.parametrize("record", KINDS)
def test_no_rows_are_a_table_with_the_records_columns(record: type[Any]) -> None:
    table = to_table(record, [])
    assert table.schema.equals(schema_of(record))
    assert from_table(record, table) == []


@pytest.mark.parametrize("version", ["0", "1", None])
def test_another_schema_version_is_refused(version: str | None) -> None:
    table = to_table(Candidate, [Candidate("c", "p", "m", "r", "complete")])
    other = table.replace_schema_metadata({"schema_version": version} if version else None)
    with pytest.raises(ValueError, match=f"schema version {version or 'none'}, not 2"):
        from_table(Candidate, other)


def test_equal_conversations_are_one_prompt_whatever_else_is_known_of_them() -> None:
    one, other = messages_from("Why?"), messages_from([{"role": "user", "content": "Why?"}])
    assert prompt_identity(one) == prompt_identity(other)
    assert prompt_identity(one) != prompt_identity((Message("system", "Why?"),))
    assert Prompt(prompt_identity(one), one, "a.jsonl:1").prompt_id == prompt_identity(other)
