"""The text index beside a small database with the tables of Argilla's that it reads."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

from judging import argilla


@pytest.fixture
def text_index(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As the server imports it: from its folder, without Pairwright's packages."""
    monkeypatch.syspath_prepend(str(Path(argilla.__file__).parent))
    return __import__("text_index")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    change(
        tmp_path,
        """CREATE TABLE datasets (id TEXT, status TEXT);
        CREATE TABLE fields (name TEXT, dataset_id TEXT, settings TEXT, inserted_at TEXT);
        CREATE TABLE records (id TEXT, dataset_id TEXT, fields TEXT, updated_at TEXT);
        INSERT INTO datasets VALUES ('d1', 'ready'), ('d2', 'ready'), ('d3', 'draft');
        INSERT INTO fields VALUES
            ('prompt', 'd1', '{"type": "text"}', '1'), ('picture', 'd1', '{"type": "image"}', '2'),
            ('rank', 'd2', '{"type": "custom"}', '1');""",
    )
    write(tmp_path, "d1", "r1", {"prompt": "a red fox", "picture": "fox.png"})
    write(tmp_path, "d1", "r2", {"prompt": "a blue whale"})
    write(tmp_path, "d2", "r3", {"rank": {"left": ["a red panda"], "right": 7, "none": None}})
    return tmp_path


def change(home: Path, script: str) -> None:
    with closing(sqlite3.connect(home / "argilla.db")) as connection:
        connection.executescript(script)


def write(home: Path, dataset: str, record: str, fields: object, time: str = "1") -> None:
    with closing(sqlite3.connect(home / "argilla.db")) as connection, connection:
        connection.execute("DELETE FROM records WHERE id = ?", [record])
        values = [record, dataset, json.dumps(fields), time]
        connection.execute("INSERT INTO records VALUES (?, ?, ?, ?)", values)


def found(text_index: ModuleType, home: Path, dataset: str, word: str) -> set[str]:
    table = text_index.table_of(dataset)
    with text_index.connected(home) as connection:
        rows = connection.execute(
            f"""SELECT d.record_id FROM {table} t JOIN documents d ON d.number = t.rowid
            WHERE t.{table} MATCH ?""",
            [f'"{word}"'],
        )
        return {record for (record,) in rows}


def test_what_a_crash_left_unwritten_is_caught_up_with(text_index: ModuleType, home: Path) -> None:
    text_index.catch_up(home)
    assert found(text_index, home, "d1", "red") == {"r1"}
    assert found(text_index, home, "d2", "panda") == {"r3"}
    write(home, "d1", "r2", {"prompt": "a red whale"}, time="2")  # changed
    write(home, "d1", "r4", {"prompt": "a red kite"})  # new
    change(home, "DELETE FROM records WHERE id = 'r1'")
    text_index.catch_up(home)
    assert found(text_index, home, "d1", "red") == {"r2", "r4"}
    assert found(text_index, home, "d1", "blue") == set()


def test_what_is_deleted_is_in_the_file_no_more(text_index: ModuleType, home: Path) -> None:
    text_index.catch_up(home)
    text_index.forget_records(home, "d1", ["r1"])
    assert found(text_index, home, "d1", "fox") == set()
    assert documents(home) == {"r2", "r3"}
    text_index.delete_index(home, "d1")
    change(home, "DELETE FROM datasets WHERE id = 'd2'; DELETE FROM records WHERE id = 'r3'")
    text_index.catch_up(home)
    # The dataset d1 is still there, so it is indexed anew; d2 is gone, also from the index.
    assert documents(home) == {"r1", "r2"}
    with closing(sqlite3.connect(home / "search.db")) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'texts_%'")
        assert not any("d2" in name for (name,) in tables)


def documents(home: Path) -> set[str]:
    with closing(sqlite3.connect(home / "search.db")) as connection:
        return {record for (record,) in connection.execute("SELECT record_id FROM documents")}


def test_pictures_are_no_text_and_custom_fields_are_what_is_in_them(
    text_index: ModuleType, home: Path
) -> None:
    text_index.catch_up(home)
    assert found(text_index, home, "d1", "png") == set()
    assert found(text_index, home, "d2", "7") == {"r3"}
    assert found(text_index, home, "d2", "left") == set()


def test_the_index_cannot_change_argillas_database(text_index: ModuleType, home: Path) -> None:
    text_index.catch_up(home)
    with text_index.connected(home) as connection, pytest.raises(sqlite3.OperationalError):
        connection.execute("DELETE FROM argilla.records")
