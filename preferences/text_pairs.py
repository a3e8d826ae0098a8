"""The pairs of any preference dataset, as texts.

A dataset is a folder with `data/<split>-*.parquet`, as the store and `pairwright export` write it
and the Hub has many, or a table with a row a pair. Prompt and answers are texts or messages;
without a column for the prompt, the two conversations share all turns but the last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow.parquet as pq

from preferences.conversations import parse_messages, parse_transcript, split_answers
from preferences.errors import InputError
from preferences.records import Message, Messages
from preferences.tables import SUFFIXES, Row, column, read_rows, table_suffix


@dataclass(frozen=True, slots=True)
class TextPair:
    """One row of a preference dataset. A text that was missing is an empty one."""

    pair_id: str
    """Its `preference_id`, or else its place, as `pairs.jsonl:17`."""
    split: str
    prompt: str
    """All turns, a line break between two."""
    chosen: str
    rejected: str
    probability: float | None = None
    """P(chosen beats rejected), as the dataset has it: nobody has looked whether it can be."""
    category: str | None = None


def read_pairs(dataset: str, split: str | None = None) -> Iterator[TextPair]:
    """The pairs of a dataset, or of one of its splits, a few thousand rows in memory at a time.

    A table has the splits that its column `split` names, or is `train` as a whole. Raises
    InputError naming the place if there is no dataset or a row is no pair.
    """
    if table_suffix(dataset) is not None:
        for place, row in read_rows(dataset):
            of = str(row.get("split") or "train")
            if split in (None, of):
                yield text_pair(row, place, of)
        return
    try:
        fs, root = fsspec.core.url_to_fs(dataset)
    except (ImportError, ValueError) as error:
        raise InputError(f"{dataset}: no address of a dataset ({error})") from error
    files = sorted(fs.glob(f"{root}/data/*.parquet"))
    if not files:
        kinds = ", ".join(SUFFIXES)
        raise InputError(
            f"{dataset}: no dataset; give a folder with data/*.parquet in it, or a table ({kinds})"
        )
    categories = _categories(fs, root)
    for path in files:
        of = path.rsplit("/", 1)[-1].removesuffix(".parquet").split("-")[0]
        if split in (None, of):
            for place, row in read_rows(str(fs.unstrip_protocol(path))):
                yield text_pair(row, place, of, categories)


def text_pair(
    row: Row, place: str, split: str, categories: Mapping[str, str] | None = None
) -> TextPair:
    """One row as a pair; `categories` are those of the prompts, by id."""
    chosen = _turns(column(row, "chosen", place), "assistant", place)
    rejected = _turns(column(row, "rejected", place), "assistant", place)
    asked = next((row[n] for n in ("messages", "prompt") if row.get(n) is not None), None)
    if len(chosen) > 1 and len(rejected) > 1:
        prompt, better, worse = split_answers(chosen, rejected, place)
    elif "prompt" in row or "messages" in row:
        prompt = _turns(asked, "user", place)
        better, worse = _last(chosen), _last(rejected)
    elif not _last(chosen).lstrip().startswith("Human:"):
        raise InputError(
            f"{place}: no column 'prompt' or 'messages', and 'chosen' is no whole conversation; "
            "add the prompt"
        )
    else:
        one, other = (parse_transcript(_last(turns), place) for turns in (chosen, rejected))
        prompt, better, worse = split_answers(one, other, place)
    category = row.get("category") or (categories or {}).get(str(row.get("prompt_id")))
    return TextPair(
        pair_id=_printable(row.get("preference_id") or place),
        split=_printable(split),
        prompt="\n".join(turn.content for turn in prompt),
        chosen=better,
        rejected=worse,
        probability=_probability(row.get("probability"), place),
        category=_printable(category) if category else None,
    )


def _turns(value: Any, role: str, place: str) -> Messages:
    if value is None:
        return ()
    return (Message(role, value),) if isinstance(value, str) else parse_messages(value, place)


def _last(turns: Messages) -> str:
    return turns[-1].content if turns else ""


def _probability(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{place}: the probability is {str(value)[:40]!r}; give a number")
    return float(value)


def _printable(value: Any) -> str:
    # Half of a surrogate pair can be read from JSON, but not written to a terminal.
    return str(value).encode("utf-8", "replace").decode()


def _categories(fs: Any, root: str) -> dict[str, str]:
    """The categories of the prompts a dataset of the store was made from, by the prompt's id."""
    found: dict[str, str] = {}
    if not fs.exists(f"{root}/manifest.json"):
        return found
    manifest = json.loads(fs.cat_file(f"{root}/manifest.json"))
    # A folder from elsewhere can have a manifest of another kind.
    inputs = manifest.get("inputs", ()) if isinstance(manifest, dict) else ()
    artifacts = root.rstrip("/").rsplit("/", 2)[0]
    for name in (n for n in inputs if str(n).startswith("prompts/")):
        for path in fs.glob(f"{artifacts}/{name}/part-*.parquet"):
            with fs.open(path, "rb") as stream:
                table = pq.read_table(stream, columns=["prompt_id", "category"])
            rows = table.filter(table["category"].is_valid())
            columns = (rows[name].to_pylist() for name in ("prompt_id", "category"))
            found.update(zip(*columns, strict=True))
    return found
