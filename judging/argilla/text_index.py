"""The text index: in `search.db`, a table for each dataset with a column for each field.

It is made from Argilla's database, which is attached as `argilla` and can be read only. Runs inside
the Argilla server, so it imports nothing of Pairwright.
"""

# What is imported is in Argilla's environment, where types are not checked.
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from text_query import EVERY, WORDS, column_of, text_of, words

MAPPED_BYTES = 1 << 30
"""Of each of the two files, at most."""


def catch_up(home: Path) -> None:
    """Make the text index, or add what is missing in it: a crash can come before it is written."""
    with contextlib.closing(sqlite3.connect(home / "search.db")) as connection:
        connection.executescript(
            """PRAGMA journal_mode=WAL;
            CREATE TABLE IF NOT EXISTS documents (
                number INTEGER PRIMARY KEY,
                record_id TEXT NOT NULL UNIQUE,
                dataset_id TEXT NOT NULL,
                updated_at TEXT NOT NULL
            );
            CREATE INDEX IF NOT EXISTS documents_of_dataset ON documents (dataset_id);"""
        )
    with connected(home) as connection:
        published = "SELECT id FROM argilla.datasets WHERE status = 'ready'"
        datasets = [id_ for (id_,) in connection.execute(published)]
        gone = connection.execute(
            f"SELECT DISTINCT dataset_id FROM documents WHERE dataset_id NOT IN ({published})"
        ).fetchall()
    for (dataset,) in gone:
        delete_index(home, dataset)
    for dataset in datasets:
        create_index(home, dataset)
        with connected(home) as connection:
            stale = connection.execute(
                """SELECT r.id FROM argilla.records r LEFT JOIN documents d ON d.record_id = r.id
                WHERE r.dataset_id = ? AND d.updated_at IS NOT r.updated_at""",
                [dataset],
            ).fetchall()
            deleted = connection.execute(
                """SELECT record_id FROM documents WHERE dataset_id = ?
                AND record_id NOT IN (SELECT id FROM argilla.records)""",
                [dataset],
            ).fetchall()
        add_records(home, dataset, [id_ for (id_,) in stale])
        forget_records(home, dataset, [id_ for (id_,) in deleted])


@contextlib.contextmanager
def connected(home: Path) -> Iterator[sqlite3.Connection]:
    """The text index with Argilla's database, which can be read only, beside it."""
    own = (home / "search.db").as_uri()
    connection = sqlite3.connect(own, uri=True, timeout=30, isolation_level=None)
    with contextlib.closing(connection):
        # A lone surrogate, as a model can emit, is no UTF-8.
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        connection.execute("ATTACH ? AS argilla", [f"{(home / 'argilla.db').as_uri()}?mode=ro"])
        # Every request has a connection of its own, which starts without a cache.
        connection.execute(f"PRAGMA mmap_size={MAPPED_BYTES}")
        yield connection


@contextlib.contextmanager
def _writing(home: Path) -> Iterator[sqlite3.Connection]:
    with connected(home) as connection:
        # One writer at a time, who reads what is there by then: the last one leaves the newest.
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")


def create_index(home: Path, dataset: str) -> None:
    with _writing(home) as connection:
        columns = ", ".join(["everything", *_columns(connection, dataset).values()])
        connection.execute(
            f"CREATE VIRTUAL TABLE IF NOT EXISTS {table_of(dataset)} "
            f'USING fts5({columns}, tokenize = "{WORDS}")'
        )


def delete_index(home: Path, dataset: str) -> None:
    with _writing(home) as connection:
        connection.execute(f"DROP TABLE IF EXISTS {table_of(dataset)}")
        connection.execute("DELETE FROM documents WHERE dataset_id = ?", [dataset])


def add_records(home: Path, dataset: str, ids: Sequence[str]) -> None:
    with _writing(home) as connection:
        columns = _columns(connection, dataset)
        names = ", ".join(["rowid", "everything", *columns.values()])
        marks = ", ".join(["?", "?", *("?" for _ in columns)])
        records = connection.execute(
            """SELECT id, fields, updated_at FROM argilla.records
            WHERE dataset_id = ? AND id IN (SELECT value FROM json_each(?))""",
            [dataset, json.dumps(ids)],
        ).fetchall()
        for id_, fields, updated_at in records:
            ((number,),) = connection.execute(
                """INSERT INTO documents (record_id, dataset_id, updated_at) VALUES (?, ?, ?)
                ON CONFLICT (record_id) DO UPDATE SET updated_at = excluded.updated_at
                RETURNING number""",
                [id_, dataset, updated_at],
            ).fetchall()
            held = json.loads(fields)
            connection.execute(
                f"REPLACE INTO {table_of(dataset)} ({names}) VALUES ({marks})",
                [number, EVERY, *(words(text_of(held.get(field))) for field in columns)],
            )


def forget_records(home: Path, dataset: str, ids: Sequence[str]) -> None:
    chosen = "record_id IN (SELECT value FROM json_each(?))"
    with _writing(home) as connection:
        connection.execute(
            f"DELETE FROM {table_of(dataset)} "
            f"WHERE rowid IN (SELECT number FROM documents WHERE {chosen})",
            [json.dumps(ids)],
        )
        connection.execute(f"DELETE FROM documents WHERE {chosen}", [json.dumps(ids)])


def _columns(connection: sqlite3.Connection, dataset: str) -> dict[str, str]:
    """The column of each field that holds text, by the field's name."""
    fields = connection.execute(
        """SELECT name FROM argilla.fields WHERE dataset_id = ?
        AND json_extract(settings, '$.type') <> 'image' ORDER BY inserted_at, name""",
        [dataset],
    )
    return {name: column_of(name) for (name,) in fields}


def table_of(dataset: str) -> str:
    return f'"texts_{dataset}"'
