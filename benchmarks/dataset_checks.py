"""`pairwright lint` and `pairwright diff`: seconds and memory, by number of pairs.

    python benchmarks/dataset_checks.py --rows 100000 1000000

Pairs of about 1 KB, four to a prompt, a tenth of the prompts held out, are written as a dataset;
for `diff`, again with other probabilities. Each command runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from table import peak_gib, write_table

from preferences.diff import diff
from preferences.export import write_rows
from preferences.lint import lint
from preferences.records import Message, prompt_identity
from preferences.splits import SplitConfig, side

CHARACTERS = {"prompt": 180, "answer": 400}
PAIRS_OF_A_PROMPT = 4


def pairs(rows: int, split: str, seed: int) -> Iterator[dict[str, object]]:
    """The rows of one split; `seed` changes the probabilities and nothing else."""
    draw, labels = random.Random(0), random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=n % 9 + 2)) for n in range(5000)]
    pool = " ".join(draw.choices(words, k=200_000))

    def text(length: int) -> str:
        start = draw.randrange(len(pool) - length)
        return pool[start : start + length]

    for number in range(rows // PAIRS_OF_A_PROMPT):
        prompt = text(CHARACTERS["prompt"])
        identity = prompt_identity((Message("user", prompt),))
        answers = [text(CHARACTERS["answer"]) for _ in range(PAIRS_OF_A_PROMPT + 1)]
        if side(identity, SplitConfig()) != split:
            continue
        for n in range(PAIRS_OF_A_PROMPT):
            yield {
                "preference_id": f"{number:016x}{n:04x}",
                "prompt_id": identity,
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": answers[n]}],
                "rejected": [{"role": "assistant", "content": answers[n + 1]}],
                "probability": labels.uniform(0.6, 1),
            }


def prepare(folder: Path, rows: int) -> None:
    """Two datasets, `before` and `after`."""
    for seed, name in enumerate(("before", "after")):
        (folder / name / "data").mkdir(parents=True)
        for split in ("train", "test"):
            path = folder / name / "data" / f"{split}-000-of-001.parquet"
            write_rows(path, pairs(rows, split, seed))


def measure(command: str, folder: Path) -> dict[str, float]:
    """Seconds and the peak of memory."""
    before, after = str(folder / "before"), str(folder / "after")
    started = time.perf_counter()
    if command == "lint":
        lint(before)
    else:
        diff(before, after)
    return {"seconds": time.perf_counter() - started, "gib": peak_gib()}


def main() -> None:
    """Prepare, measure each in a child, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        command, folder = arguments.measure
        print(json.dumps(measure(command, Path(folder))))
        return
    table = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name), rows)
            cells = [f"{rows:,}"]
            for command in ("lint", "diff"):
                call = [sys.executable, __file__, "--measure", command, name]
                done = subprocess.run(call, check=True, capture_output=True)
                found = json.loads(done.stdout)
                cells += [f"{found['seconds']:.1f}", f"{found['gib']:.2f}"]
        table.append(cells)
        header = ["pairs", "lint s", "lint GiB", "diff s", "diff GiB"]
        write_table("dataset_checks", header, table)


if __name__ == "__main__":
    main()
