"""Ranked answers of the tiny world, as a dataset holds them: as pairs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.training.conftest import COLOURS, THINGS

Beats = tuple[str, str]
"""Two answers, the better one first."""


def pair_rows(prompt: str, pairs: Iterable[Beats]) -> list[dict[str, Any]]:
    """An answer's id is its text with its prompt's."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
            "prompt_id": f"p-{prompt}",
            "chosen_id": f"{prompt}/{better}",
            "rejected_id": f"{prompt}/{worse}",
            "probability": 0.9,
            "margin": 2.0,
        }
        for better, worse in pairs
    ]


def write_rows(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000.parquet")
    return folder


def ranked(answers: Sequence[str]) -> list[Beats]:
    """All pairs of answers that are given from the best to the worst."""
    return list(itertools.combinations(answers, 2))


def red_lists(folder: Path) -> Path:
    """24 prompts and 12 held-out ones with three or four answers, the redder the better."""
    chance = random.Random(3)
    others = [colour for colour in COLOURS if colour != "red"]

    def answers(number: int) -> list[str]:
        reds = (4, 2, 1, 0) if number % 3 else (4, 2, 0)
        return [" ".join(["red"] * n + chance.choices(others, k=4 - n)) for n in reds]

    for split, things in (("train", THINGS[:24]), ("test", THINGS[24:36])):
        rows = [
            row
            for number, thing in enumerate(things)
            for row in pair_rows(f"paint {thing}", ranked(answers(number)))
        ]
        write_rows(folder, split, rows)
    return folder
