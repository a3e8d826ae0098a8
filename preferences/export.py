"""A dataset in the forms that trainers take, and on the Hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preferences.card import markdown_table
from preferences.errors import InputError
from preferences.policies import by_mean
from preferences.records import (
    Candidate,
    Messages,
    Prompt,
    Ranking,
    Triplet,
    from_table,
    messages_from,
)
from preferences.store import ROW_GROUP, full_disk_explained

Form = Literal["conversational", "plain", "kto"]
"""`conversational`: prompt, chosen and rejected as messages, as the dataset holds them; `plain`:
the same as texts; `kto`: a row an answer, with a label."""
FORMS: tuple[str, ...] = get_args(Form)


def export(dataset: Path, output: Path, form: str, name: str) -> dict[str, int]:
    """Write a finished dataset to a folder in another form; returns the rows of each split.

    The folder loads with `datasets.load_dataset(folder)`.
    """
    if form not in FORMS:
        raise InputError(f"no form {form!r}; there are: {', '.join(FORMS)}")
    require_new(output)
    counts: dict[str, int] = {}
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with full_disk_explained(output, "the dataset is untouched"):
        try:
            (temporary / "data").mkdir(parents=True)
            paths = sorted((dataset / "data").glob("*.parquet"))
            targets = [temporary / "data" / path.name for path in paths]
            with ThreadPoolExecutor(os.cpu_count()) as threads:  # Arrow computes beside Python.
                written = list(threads.map(WRITERS[form], paths, targets))
            for path, count in zip(paths, written, strict=True):
                split = path.name.split("-")[0]
                counts[split] = counts.get(split, 0) + count
            card = (dataset / "README.md").read_text(encoding="utf-8")
            if form != "conversational":
                front, _, _ = card.partition("\n# ")
                table = markdown_table(
                    ["split", "rows"], [[s, f"{n:,}"] for s, n in counts.items()]
                )
                card = f"{front}\n# {name}, {form} form\n\n{table}\n"
            (temporary / "README.md").write_text(card, encoding="utf-8")
            temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _copy(path: Path, target: Path) -> int:
    shutil.copyfile(path, target)
    return int(pq.read_metadata(path).num_rows)


def _write_plain(path: Path, target: Path) -> int:
    return write_tables(target, map(plain_table, read_tables(path)))


def _write_kto(path: Path, target: Path) -> int:
    return write_rows(target, kto_rows(read_triplets(path)))


WRITERS: dict[str, Callable[[Path, Path], int]] = {
    "conversational": _copy,
    "plain": _write_plain,
    "kto": _write_kto,
}


def require_new(output: Path) -> None:
    """Raise InputError if there is something at `output`: an export never overwrites."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: already exists; name a new folder")


def read_tables(path: Path) -> Iterator[pa.Table]:
    """One file of a dataset, a row group at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def read_triplets(path: Path) -> Iterator[Triplet]:
    """The triplets of one file of a dataset, a row group at a time."""
    for table in read_tables(path):
        yield from from_table(Triplet, table)


def plain_table(table: pa.Table) -> pa.Table:
    """Prompt and answers as texts; a conversation of several turns as a transcript."""
    if pc.all(pc.equal(pc.list_value_length(table["prompt"]), 1)).as_py():
        prompts = contents(table["prompt"])
    else:
        texts = (plain_text(messages_from(turns)) for turns in table["prompt"].to_pylist())
        prompts = pa.array(texts, pa.string())
    kept = {name: table[name] for name in ("probability", "margin", "preference_id", "prompt_id")}
    answers = {name: contents(table[name]) for name in ("chosen", "rejected")}
    return pa.table({"prompt": prompts, **answers, **kept})


def contents(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The texts of conversations of one turn each."""
    return pc.struct_field(pc.list_flatten(column), "content")


def kto_rows(triplets: Iterable[Triplet]) -> Iterator[dict[str, Any]]:
    """A row for each answer, once: `label` says whether it was preferred.

    An answer that won one pair and lost another is neither, and is left out.
    """
    for _, of_prompt in groupby(triplets, key=lambda t: t.prompt_id):
        labels: dict[str, set[bool]] = {}
        texts: dict[str, tuple[Messages, Messages]] = {}
        prompt_id = ""
        for triplet in of_prompt:
            prompt_id = triplet.prompt_id
            for identity, answer, label in (
                (triplet.chosen_id, triplet.chosen, True),
                (triplet.rejected_id, triplet.rejected, False),
            ):
                labels.setdefault(identity, set()).add(label)
                texts[identity] = (triplet.prompt, answer)
        for identity, found in labels.items():
            if len(found) == 1:
                prompt, completion = texts[identity]
                yield {
                    "prompt": as_dicts(prompt),
                    "completion": as_dicts(completion),
                    "label": found.pop(),
                    "candidate_id": identity,
                    "prompt_id": prompt_id,
                }


def ranking_rows(
    rankings: Iterable[Ranking],
    prompts: Mapping[str, Prompt],
    candidates: Mapping[str, Candidate],
) -> Iterator[dict[str, Any]]:
    """A row for each prompt: its answers from the best to the worst, with their means."""
    for ranking in rankings:
        order = by_mean(ranking)
        answers = [candidates[ranking.candidate_ids[n]] for n in order]
        yield {
            "prompt": as_dicts(prompts[ranking.prompt_id].messages),
            "completions": [a.response for a in answers],
            "scores": [ranking.mean[n] for n in order],
            "models": [a.model for a in answers],
            "candidate_ids": [a.candidate_id for a in answers],
            "prompt_id": ranking.prompt_id,
        }


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write rows to a Parquet file in groups; the first group gives the schema."""

    def tables() -> Iterator[pa.Table]:
        schema = None
        while group := list(islice(rows, ROW_GROUP)):
            table = pa.Table.from_pylist(group, schema=schema)
            schema = table.schema
            yield table

    return write_tables(path, tables())


def write_tables(path: Path, tables: Iterator[pa.Table]) -> int:
    """Write tables of one schema to a Parquet file; returns the number of rows."""
    count, writer = 0, None
    try:
        for table in tables:
            if not table.num_rows:
                continue
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
            count += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return count


def plain_text(messages: Messages) -> str:
    """A single user turn as it is; more turns as a transcript that ends where the answer begins."""
    if len(messages) == 1:
        return messages[0].content
    turns = [f"{m.role.capitalize()}: {m.content}" for m in messages]
    return "\n\n".join([*turns, "Assistant:"])


def as_dicts(messages: Messages) -> list[dict[str, str]]:
    """Messages as the role/content objects that everybody reads."""
    return [{"role": m.role, "content": m.content} for m in messages]
