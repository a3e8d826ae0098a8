"""Rows of any table people keep prompts, answers or judgments in.

JSON Lines, JSON, CSV and Parquet, each also gzipped, from a path or URL; a folder written by the
`datasets` library; or a data set on the Hub. Every row comes with its place, so that an error can
name it.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow.parquet as pq

from preferences.errors import InputError
from preferences.fingerprint import file_fingerprint, fingerprint

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

Row = dict[str, Any]


def read_rows(source: str, split: str = "train") -> Iterator[tuple[str, Row]]:
    """Yield `(place, row)` for each row; a place reads `prompts.jsonl:17`.

    `source` is a file, a folder of the `datasets` library, or a Hub id (`split` is for these two).
    Raises InputError naming file, line and cure.
    """
    name = table_name(source)
    if table_suffix(source) is None:
        yield from _dataset_rows(source, split)
        return
    try:
        with fsspec.open(source, "rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if source.endswith(".gz") else raw
            try:
                yield from _FILE_READERS[table_suffix(source) or ""](name, stream)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise InputError(f"{name}: damaged gzip file ({error}); fetch it anew") from error
    except FileNotFoundError:
        raise InputError(f"{source}: no such file; check the path") from None
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def table_name(source: str) -> str:
    """The name of a table as messages and records give it: the file's, without its folders."""
    return source.rstrip("/").rsplit("/", 1)[-1] if "/" in source else source


def table_suffix(source: str) -> str | None:
    """`.jsonl`, `.json`, `.csv` or `.parquet`; None for a folder or a Hub id."""
    plain = source.removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), None)


def table_fingerprint(source: str, split: str = "train") -> str:
    """Content identity of a table: of the file's bytes, or of the folder's data files.

    A Hub id stands for itself; name a revision in it (`org/name@commit`) to pin what it means.
    """
    if table_suffix(source) is not None:
        try:
            with fsspec.open(source, "rb") as stream:
                return file_fingerprint(stream)
        except FileNotFoundError:
            raise InputError(f"{source}: no such file; check the path") from None
        except (PermissionError, IsADirectoryError) as error:
            raise InputError(f"{source}: cannot be read ({error.strerror})") from error
    folder = Path(source)
    if not folder.is_dir():
        _require_hub_id(source)
        return fingerprint([source, split])
    return folder_fingerprint(folder, split)


def folder_fingerprint(folder: Path, *context: str) -> str:
    """Content identity of a folder: the names and bytes of its files, hidden ones left out."""
    contents: list[Any] = list(context)
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            with path.open("rb") as stream:
                contents.append([relative.as_posix(), file_fingerprint(stream)])
    return fingerprint(contents)


def column(row: Row, name: str, place: str) -> Any:
    """The row's value in a column that has to be there."""
    if name not in row:
        raise InputError(f"{place}: no column {name!r}; {suggestion(name, row)}")
    return row[name]


def text_column(row: Row, name: str, place: str) -> str:
    """The row's text in a column that has to be there and hold text."""
    value = column(row, name, place)
    if not isinstance(value, str):
        raise InputError(
            f"{place}: column {name!r} holds {type(value).__name__} {str(value)[:40]!r}, not text; "
            "map another column or mend the row"
        )
    return value


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean 'prompt'?`, or the names there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are: {', '.join(known) or 'none'}"


def _jsonl_rows(name: str, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place}: not JSON ({error}); mend or remove the line") from error
        yield place, _mapping(row, place)


def _json_rows(name: str, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.load(stream)
    except ValueError as error:
        raise InputError(f"{name}: not JSON ({error}); mend the file") from error
    if not isinstance(rows, list):
        raise InputError(f"{name}: holds a JSON {type(rows).__name__}; a list of objects is needed")
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", _mapping(row, f"{name}:{number}")


def _csv_rows(name: str, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
    try:
        for row in reader:
            place = f"{name}:{reader.line_num}"
            if None in row or None in row.values():
                raise InputError(
                    f"{place}: not {len(reader.fieldnames or ())} fields as in the header; "
                    "mend or remove the line"
                )
            yield place, dict(row)
    except csv.Error as error:
        raise InputError(f"{name}:{reader.line_num}: not CSV ({error}); mend the line") from error


def _parquet_rows(name: str, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        file = pq.ParquetFile(stream)
        for batch in file.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", row
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: not a readable Parquet file ({error})") from error


_FILE_READERS = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _dataset_rows(source: str, split: str) -> Iterator[tuple[str, Row]]:
    import datasets

    folder = Path(source)
    try:
        if folder.is_dir():
            saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
            data = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
        else:
            _require_hub_id(source)
            repository, _, revision = source.partition("@")
            data = datasets.load_dataset(repository, revision=revision or None)
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds, each with a reason worth showing
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{source}: cannot be loaded as a data set ({reason})") from error
    if isinstance(data, Mapping):
        if split not in data:
            raise InputError(f"{source}: no split {split!r}; {suggestion(split, data)}")
        data = data[split]
    name = table_name(source)
    for number, row in enumerate(data, 1):
        yield f"{name}:{number}", dict(row)


def _require_hub_id(source: str) -> None:
    parts = source.partition("@")[0].split("/")
    looks_like_a_path = source.startswith((".", "/", "~")) or len(parts) > 2 or "" in parts
    if looks_like_a_path or "." in parts[-1][-6:]:
        kinds = ", ".join(SUFFIXES)
        raise InputError(f"{source}: no such file or folder (files: {kinds}); check the path")


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{place}: holds a {type(row).__name__}; an object is needed")
    return row
