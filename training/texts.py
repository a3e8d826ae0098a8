"""Plain texts as blocks of tokens, for pre-training: gathering, packing, counts.

A dataset is a folder with `data/train-*.parquet` and, for held-out texts, `data/test-*.parquet`,
with a column `text` and, where there are old texts among them, a column `origin` that says `new` or
`old`. `gather_texts` makes one of tables of any kind.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.records import Dropped
from preferences.tables import read_rows
from training.data import READ_ROWS, HeldOutPrompt, SplitCounts

Origin = Literal["new", "old"]


@dataclass(frozen=True, slots=True)
class Packed:
    """Texts one after the other, cut into blocks. Every token is in one block."""

    tokens: Any
    """All of them, a numpy array of int32."""
    starts: tuple[int, ...]
    """Where each block begins; it ends where the next one does, and the last may be shorter."""
    texts: int
    cut: int
    """Texts that a block's edge divides: their later part does not see the earlier one."""

    def __len__(self) -> int:
        return len(self.starts)

    def block(self, index: int) -> Any:
        """The tokens of one."""
        ends = (*self.starts[1:], len(self.tokens))
        return self.tokens[self.starts[index] : ends[index]]


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """What became of a split's texts, as in `blocks.json`."""

    texts: int
    """Without the empty ones."""
    old_texts: int
    tokens: int
    """End tokens included; of old texts, those of the blocks that were taken."""
    old_tokens: int
    cut: int
    """Texts, new or old, that a block's edge divides."""
    blocks: int
    old_blocks: int
    old_blocks_left: int
    """Blocks of old texts that were not taken."""
    longest_block: int
    """In tokens."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """One split."""

    rows: Any
    """A `datasets.Dataset` with `input_ids` and `old`."""
    counts: SplitCounts
    """In blocks, and texts that were dropped."""
    dropped: tuple[Dropped, ...]
    block_counts: BlockCounts
    prompts: tuple[HeldOutPrompt, ...] = ()
    """None: nobody asks."""


def gather_texts(
    new: Sequence[str],
    old: Sequence[str],
    dataset: Path,
    *,
    column: str = "text",
    held_out: float = 0.01,
) -> dict[str, dict[Origin, int]]:
    """Write the texts of tables (JSON Lines, CSV, Parquet, gzipped or not, or Hub data sets) as one
    dataset; returns how many texts there are, by split and origin.

    A share `held_out` of the texts goes to the test split; which ones is decided by their content,
    so equal texts stay together. Raises InputError for a row without text, naming its place.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string()), ("origin", pa.string())])
    found: dict[str, dict[Origin, int]] = {
        split: {"new": 0, "old": 0} for split in ("train", "test")
    }
    (dataset / "data").mkdir(parents=True, exist_ok=True)
    if any((dataset / "data").iterdir()):
        raise InputError(f"{dataset}: there is data in it already; name a new folder")
    files = {split: dataset / "data" / f"{split}-00000.parquet" for split in found}
    waiting: dict[str, list[dict[str, str]]] = {split: [] for split in found}
    writers = {split: pq.ParquetWriter(file, schema) for split, file in files.items()}
    try:
        for origin, text in _texts(new, old, column):
            split = "test" if int(fingerprint(text)[:8], 16) < held_out * 2**32 else "train"
            found[split][origin] += 1
            waiting[split].append({"text": text, "origin": origin})
            if len(waiting[split]) == READ_ROWS:
                writers[split].write_table(pa.Table.from_pylist(waiting[split], schema))
                waiting[split].clear()
        for split, writer in writers.items():
            writer.write_table(pa.Table.from_pylist(waiting[split], schema))
    finally:
        for writer in writers.values():
            writer.close()
    if not sum(found["test"].values()):
        files["test"].unlink()
    return found


def _texts(new: Sequence[str], old: Sequence[str], column: str) -> Iterator[tuple[Origin, str]]:
    origins: tuple[tuple[Origin, Sequence[str]], ...] = (("new", new), ("old", old))
    for origin, tables in origins:
        for table in tables:
            for place, row in read_rows(table):
                if not isinstance(row.get(column), str):
                    raise InputError(f"{place}: no text in a column {column!r}; name its column")
                yield origin, row[column]


def load_blocks(
    dataset: Path, split: str, tokenizer: Any, *, length: int, replay: float | None, seed: int
) -> Blocks | None:
    """The blocks of a split, or None where the dataset has no such split.

    With `replay`, so many of the old texts' blocks are taken, drawn by `seed`, that they are this
    share of all; None takes every block there is. Raises InputError if there are not as many.
    """
    import datasets
    import pyarrow as pa

    files = sorted((dataset / "data").glob(f"{split}-*.parquet"))
    if not files:
        return None
    texts: dict[str, list[list[int]]] = {"new": [], "old": []}
    dropped: list[Dropped] = []
    for place, origin, text in _rows(files):
        if not text.strip():
            dropped.append(Dropped("training", place, "", "empty_text"))
            continue
        texts[origin].append(_closed(tokenizer, text))
    new, old = (pack(texts[origin], length) for origin in ("new", "old"))
    if not new and replay is not None:
        raise InputError(f"{dataset}: the {split} split has no new texts; add some")
    taken = list(range(len(old)))
    if replay is not None:
        taken = _replayed(dataset, replay, len(new), old, length, seed)
    blocks = [new.block(i) for i in range(len(new))] + [old.block(i) for i in taken]
    rows = pa.table(
        {
            "input_ids": pa.array(blocks, pa.list_(pa.int32())),
            "old": pa.array([False] * len(new) + [True] * len(taken)),
        }
    )
    counts = SplitCounts(
        rows=len(blocks) + len(dropped),
        kept=len(blocks),
        dropped={"empty_text": len(dropped)} if dropped else {},
        boundary_shifted=0,
        without_end=0,
    )
    old_tokens = sum(len(old.block(i)) for i in taken)
    block_counts = BlockCounts(
        texts=new.texts + old.texts,
        old_texts=old.texts,
        tokens=len(new.tokens) + old_tokens,
        old_tokens=old_tokens,
        cut=new.cut + old.cut,
        blocks=len(blocks),
        old_blocks=len(taken),
        old_blocks_left=len(old) - len(taken),
        longest_block=max(map(len, blocks)),
    )
    return Blocks(datasets.Dataset(rows), counts, tuple(dropped), block_counts)


def pack(texts: Iterable[Sequence[int]], length: int) -> Packed:
    """Texts as tokens, one after the other, in blocks of `length`; the last may be shorter.

    A block's later texts see its earlier ones, from which only their end tokens part them, as in
    the model's first training.
    """
    import numpy as np

    tokens = array("i")
    number = cut = 0
    for text in texts:
        first, last = len(tokens) // length, (len(tokens) + len(text) - 1) // length
        number, cut = number + 1, cut + (last > first)
        tokens.extend(text)
    starts = tuple(range(0, len(tokens), length))
    return Packed(np.array(tokens, dtype=np.int32), starts, number, cut)


def _replayed(
    dataset: Path, share: float, new: int, old: Packed, length: int, seed: int
) -> list[int]:
    """Which of the old blocks are taken: drawn once, and of full length."""
    wanted = round(share / (1 - share) * new)
    full = len(old.tokens) // length
    if wanted > full:
        raise InputError(
            f"{dataset}: replay: {share} of the blocks wants {wanted:,} of {length:,} tokens of "
            f"old texts and there are {full:,}; add texts like those the model was trained on with "
            "the origin old, or say replay: 0"
        )
    return sorted(random.Random(f"{seed} replay").sample(range(full), wanted))


def _closed(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens and the end token behind them; what the tokenizer puts before texts stays."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Place, origin and text of each row."""
    for file in files:
        for place, row in read_rows(str(file)):
            if not isinstance(row.get("text"), str):
                raise InputError(f"{place}: no text in the column text; mend the dataset")
            origin = row.get("origin", "new")
            if origin not in ("new", "old"):
                raise InputError(f"{place}: origin is {origin!r}; it is new or old")
            yield place, origin, row["text"]
