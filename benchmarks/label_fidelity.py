"""Do planted preferences come out unflipped and unshifted?

    python benchmarks/label_fidelity.py --rows 1000000

Each prompt has a good and a bad answer, told apart by their texts. Answers and verdicts are
imported from shuffled tables; the answers' ids, authors and places say nothing of which is good,
the sides are shown at random, some rows are missing and some stand twice, the second time with the
sides swapped. The real stages make the dataset and the export. A flip is a pair whose chosen answer
is not the good one; a shift is a pair with a text that belongs to another prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from table import peak_gib, write_table

from flows import assembling, stages
from flows.plan import make_plan
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.run import Run
from preferences.export import export
from preferences.store import Store

RECIPE = """
name: planted
candidates: [{kind: import, name: answers, source: answers.jsonl}]
judges: [{kind: import, name: people, source: verdicts.jsonl}]
split: {test: 0.05}
runtime: {shard_size: 8000}
"""
COPIES = random.Random(0)
SIDES = ("good", "bad")


def copies() -> int:
    """Of a row: 2 % are missing, 2 % stand twice."""
    return COPIES.choices([0, 1, 2], [2, 96, 2])[0]


def plant(folder: Path, prompts: int) -> int:
    """Write the two tables; returns how many prompts have both answers and a verdict."""
    draw = random.Random(1)
    order = list(range(prompts))
    whole: Counter[int] = Counter()
    draw.shuffle(order)
    with (folder / "answers.jsonl").open("w") as stream:
        for n in order:
            for side in draw.sample(SIDES, 2):
                row = {
                    "prompt": f"question {n}",
                    "model": f"model-{(n * 2654435761 >> 7 ^ (side == 'good')) & 1}",
                    "response_id": name(n, side),
                    "response": f"This is {side}-{n}, an answer.",
                }
                times = copies()
                whole[n] += times > 0
                stream.write((json.dumps(row) + "\n") * times)
    draw.shuffle(order)
    pairs = 0
    with (folder / "verdicts.jsonl").open("w") as stream:
        for n in order:
            times = copies()
            pairs += times > 0 and whole[n] == 2
            for _ in range(times):
                stream.write(json.dumps(verdict(n, draw.sample(SIDES, 2))) + "\n")
    return pairs


def name(n: int, side: str) -> str:
    """An answer's id: even for the good one of some prompts and odd for that of the others."""
    return f"r{2 * n + ((side == 'good') ^ (n // 3 & 1))}"


def verdict(n: int, shown: list[str]) -> dict[str, Any]:
    """A row that says, truthfully, which of the two answers shown is better."""
    first, second = (name(n, side) for side in shown)
    better = "first" if shown[0] == "good" else "second"
    return {"prompt": f"question {n}", "first": first, "second": second, "verdict": better}


def check(folder: Path) -> Counter[str]:
    """Read the export back and count."""
    found: Counter[str] = Counter()
    text = re.compile(r"This is (good|bad)-(\d+), an answer\.")
    for path in sorted((folder / "data").glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number = row["prompt"].removeprefix("question ")
                chosen, rejected = text.fullmatch(row["chosen"]), text.fullmatch(row["rejected"])
                assert chosen is not None
                assert rejected is not None
                found["pairs"] += 1
                found["flips"] += (chosen[1], rejected[1]) != SIDES
                found["shifts"] += not chosen[2] == rejected[2] == number
    return found


def main() -> None:
    """Plant, build, export, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="prompts")
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected = plant(folder, rows)
        (folder / "recipe.yaml").write_text(RECIPE)
        started = time.perf_counter()
        plan, store = make_plan(load_recipe(folder / "recipe.yaml")), Store(folder / "store")
        run = Run(plan, store, Progress())
        stages.make_prompts(run)
        stages.make_candidates(run, 0)
        stages.make_judgments(run, 0)
        stages.make_rankings(run)
        assembling.make_preferences(run)
        assembling.make_dataset(run, RECIPE)
        export(Path(store.folder(plan.dataset)), folder / "plain", "plain", "planted")
        seconds = time.perf_counter() - started
        found = check(folder / "plain")
    header = ["prompts", "pairs owed", "pairs", "flips", "shifts", "seconds", "peak GiB"]
    counts = [rows, expected, found["pairs"], found["flips"], found["shifts"]]
    row = [*(f"{count:,}" for count in counts), f"{seconds:.0f}", f"{peak_gib():.2f}"]
    write_table("label_fidelity", header, [row])


if __name__ == "__main__":
    main()
