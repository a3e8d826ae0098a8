"""Tables in every format, and what is wrong with them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preferences.errors import InputError
from preferences.tables import column, read_rows, suggestion, table_fingerprint, text_column

ROWS = [{"prompt": "Why?", "id": "1"}, {"prompt": 'Où, "quoted"\nand on?', "id": "2"}]


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def as_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows))


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {"jsonl": as_jsonl, "json": as_json, "csv": as_csv, "parquet": as_parquet}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows_with_their_places(
    tmp_path: Path, suffix: str, zipped: bool
) -> None:
    path = tmp_path / f"prompts.{suffix}"
    write: Callable[[Path, list[dict[str, Any]]], None] = WRITERS[suffix]
    write(path, ROWS)
    if zipped:
        whole = path.with_name(path.name + ".gz")
        whole.write_bytes(gzip.compress(path.read_bytes()))
        path = whole
    found = list(read_rows(str(path)))
    assert [row for _, row in found] == ROWS
    assert found[0][0].startswith(f"{path.name}:")
    assert table_fingerprint(str(path)) == table_fingerprint(str(path))


def test_a_folder_saved_by_datasets_is_a_table_with_splits(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(str(tmp_path / "two"))
    assert list(read_rows(str(tmp_path / "one"))) == [("one:1", ROWS[0]), ("one:2", ROWS[1])]
    assert list(read_rows(str(tmp_path / "two"), "test")) == [("two:1", ROWS[1])]
    with pytest.raises(InputError, match="no split 'tset'; did you mean 'test'"):
        list(read_rows(str(tmp_path / "two"), "tset"))


def test_a_tables_fingerprint_follows_its_content_and_not_its_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = tmp_path / "t.jsonl", tmp_path / "other" / "u.jsonl"
    as_jsonl(one, ROWS)
    as_jsonl(other, ROWS)
    assert table_fingerprint(str(one)) == table_fingerprint(str(other))
    as_jsonl(other, ROWS[:1])
    assert table_fingerprint(str(one)) != table_fingerprint(str(other))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"a": 1}\n\n{"a": \n', r"t\.jsonl:3: not JSON .* mend or remove the line"),
        ("t.jsonl", b"[1]\n", r"t\.jsonl:1: holds a list; an object is needed"),
        ("t.jsonl", b'{"a": "\xff"}\n', r"t\.jsonl:1: not JSON|t\.jsonl: not UTF-8"),
        ("t.json", b"{}", r"t\.json: holds a JSON dict; a list of objects is needed"),
        ("t.json", b"[{}, 3]", r"t\.json:2: holds a int"),
        ("t.json", b"[", r"t\.json: not JSON"),
        ("t.csv", b"a,b\n1,2\n1\n", r"t\.csv:3: not 2 fields as in the header"),
        ("t.csv", b"a,b\n1,2,3\n", r"t\.csv:2: not 2 fields"),
        ("t.csv", b"a\n\xff\n", r"t\.csv: not UTF-8 text .*; save it as UTF-8"),
        ("t.parquet", b"not parquet", r"t\.parquet: not a readable Parquet file"),
        ("t.jsonl.gz", b"not gzip", r"t\.jsonl\.gz: damaged gzip file"),
        (
            "t.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9],
            r"damaged gzip file .* fetch it anew",
        ),
    ],
)
def test_a_damaged_table_is_named_with_line_and_cure(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_rows(str(tmp_path / name)))


def test_a_gzip_file_with_flipped_bits_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    rows = b"".join(json.dumps({"prompt": f"{n * n}"}).encode() + b"\n" for n in range(500))
    whole = gzip.compress(rows)
    for place in range(20, 120, 20):
        path.write_bytes(whole[:place] + b"\xff\xff\xff\xff" + whole[place + 4 :])
        with pytest.raises(InputError, match=r"t\.jsonl\.gz"):
            list(read_rows(str(path)))


@pytest.mark.parametrize("source", ["./none.jsonl", "none.csv.gz"])
def test_a_missing_file_is_named(source: str) -> None:
    with pytest.raises(InputError, match="no such file; check the path"):
        list(read_rows(source))
    with pytest.raises(InputError, match="no such file; check the path"):
        table_fingerprint(source)


@pytest.mark.parametrize("source", ["./nowhere", "/a/b/c", "table.xlsx"])
def test_what_cannot_be_a_hub_id_is_not_looked_for_there(source: str) -> None:
    with pytest.raises(InputError, match=r"no such file or folder \(files: \.jsonl, \.json"):
        list(read_rows(source))


def test_a_wrong_column_suggests_the_right_one() -> None:
    with pytest.raises(InputError, match="t:1: no column 'prompt'; did you mean 'prompts'"):
        column({"prompts": "x", "id": 1}, "prompt", "t:1")
    assert suggestion("prompt", ["zebra", "quux"]) == "there are: zebra, quux"
    with pytest.raises(InputError, match="column 'a' holds int '3', not text"):
        text_column({"a": 3}, "a", "t:1")
