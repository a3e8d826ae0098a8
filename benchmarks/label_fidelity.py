"""Do planted preferences come out unflipped and unshifted?

    python benchmarks/label_fidelity.py --prompts 1000000

Each prompt has a good and a bad answer, told apart by their texts. Answers and verdicts are
imported from shuffled tables, the sides shown at random, some rows missing and some doubled; the
real stages make the dataset. A flip is a pair whose chosen answer is not the good one; a shift is a pair with a
text that belongs to another prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from table import write_table

from flows import stages
from flows.plan import make_plan
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.stages import Run
from preferences.records import Triplet
from preferences.store import Store

RECIPE = """
name: planted
candidates: [{kind: import, name: answers, source: answers.jsonl}]
judges: [{kind: import, name: people, source: verdicts.jsonl}]
split: {test: 0.05}
runtime: {shard_size: 8000}
"""


def plant(folder: Path, prompts: int, seed: int) -> None:
    """Write the two tables: 2 % of the answers and verdicts are missing, 2 % stand twice."""
    draw = random.Random(seed)
    order = list(range(prompts))
    for table in ("answers.jsonl", "verdicts.jsonl"):
        draw.shuffle(order)
        with (folder / table).open("w") as stream:
            for n in order:
                sides = ["good", "bad"]
                draw.shuffle(sides)
                if table == "answers.jsonl":
                    rows = [
                        {
                            "prompt": f"question {n}",
                            "model": s,
                            "response": f"the {s} answer of {n}",
                        }
                        for s in sides
                    ]
                else:
                    verdict = "first" if sides[0] == "good" else "second"
                    names = {"first": sides[0], "second": sides[1]}
                    rows = [{"prompt": f"question {n}", **names, "verdict": verdict}]
                for row in rows:
                    for _ in range(draw.choices([0, 1, 2], [2, 96, 2])[0]):
                        stream.write(json.dumps(row) + "\n")


def main() -> None:
    """Plant, build, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20_000)
    prompts = parser.parse_args().prompts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(folder, prompts, seed=0)
        (folder / "recipe.yaml").write_text(RECIPE)
        recipe = load_recipe(folder / "recipe.yaml")
        started = time.perf_counter()
        run = Run(make_plan(recipe), Store(folder / "store"), Progress())
        stages.make_prompts(run)
        stages.make_candidates(run, 0)
        stages.make_judgments(run, 0)
        stages.make_rankings(run)
        stages.make_preferences(run)
        stages.make_dataset(run, RECIPE)
        seconds = time.perf_counter() - started
        flips = shifts = pairs = 0
        for split in ("train", "test"):
            for triplet in run.store.read(run.plan.dataset, Triplet, kind=f"data/{split}"):
                pairs += 1
                number = triplet.prompt[0].content.removeprefix("question ")
                chosen, rejected = triplet.chosen[0].content, triplet.rejected[0].content
                flips += not chosen.startswith("the good") or not rejected.startswith("the bad")
                shifts += not (chosen.endswith(f" {number}") and rejected.endswith(f" {number}"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    header = ["prompts", "pairs", "flips", "shifts", "seconds", "peak GiB"]
    row = [f"{prompts:,}", f"{pairs:,}", str(flips), str(shifts), f"{seconds:.0f}", f"{peak:.2f}"]
    write_table("label_fidelity", header, [row])


if __name__ == "__main__":
    main()
