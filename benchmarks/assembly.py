"""From finished rankings to an exported dataset: seconds and memory, by number of preferences.

    python benchmarks/assembly.py --rows 100000 1000000

Prompts, two answers each and their rankings, about 1 KB a preference, are written to a store a
shard at a time. What is timed is `make_preferences`, `make_dataset` and the export to two forms,
in a process of its own, with its helpers, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from table import peak_gib, write_table

from flows import assembling, stages
from flows.plan import Plan, make_plan
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.run import Run
from preferences.export import export
from preferences.records import Candidate, Message, Prompt, Ranking
from preferences.store import Artifact, Manifest, Shard, Store, shards

RECIPE = """
name: assembly
candidates: [{kind: import, name: answers, source: answers.jsonl}]
judges: [{kind: import, name: people, source: verdicts.jsonl}]
split: {test: 0.05}
runtime: {shard_size: 4000}
"""
CHARACTERS = {"prompt": 180, "answer": 400}
"""With the ids, about 1 KB a row."""
STEPS = ("preferences", "dataset", "conversational", "plain")


def planned(folder: Path) -> tuple[Plan, Store]:
    """The recipe in this folder and its store."""
    return make_plan(load_recipe(folder / "recipe.yaml")), Store(folder / "store")


def prepare(folder: Path, rows: int) -> None:
    """Write what assembly starts from."""
    (folder / "recipe.yaml").write_text(RECIPE)
    for table in ("answers.jsonl", "verdicts.jsonl"):
        (folder / table).write_text("{}\n")
    plan, store = planned(folder)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=n % 9 + 2)) for n in range(5000)]
    pool = " ".join(draw.choices(words, k=200_000))

    def text(length: int) -> str:
        start = draw.randrange(len(pool) - length)
        return pool[start : start + length]

    cut = shards(rows, load_recipe(folder / "recipe.yaml").runtime.shard_size)
    for shard in cut:
        prompts, candidates, rankings = [], [], []
        for prompt_id in sorted(ids(shard, rows)):
            message = Message("user", text(CHARACTERS["prompt"]))
            prompts.append(Prompt(prompt_id, (message,), f"prompts.jsonl:{len(prompts)}"))
            names = [hashlib.sha256(f"{prompt_id}{n}".encode()).hexdigest()[:20] for n in "01"]
            for index, name in enumerate(names):
                answer = text(CHARACTERS["answer"])
                candidates.append(
                    Candidate(name, prompt_id, f"model-{index}", answer, "complete", index)
                )
            mean = draw.uniform(0.5, 2) * draw.choice([-1, 1])
            covariance = (0.5, 0.1, 0.1, 0.5)
            rankings.append(
                Ranking(prompt_id, tuple(names), (mean, -mean), covariance, (names[0],))
            )
        store.write_part(plan.prompts, shard, Prompt, prompts)
        store.write_part(plan.candidates[0], shard, Candidate, candidates)
        store.write_part(plan.rankings, shard, Ranking, rankings)
    for artifact in (plan.prompts, *plan.candidates, plan.rankings):
        store.finish(artifact, _manifest(artifact, store.count(artifact)))


def ids(shard: Shard, rows: int) -> Iterator[str]:
    """This shard's share of the prompts' ids, spread evenly like any hash."""
    first, last = shard.buckets
    for number in range(shard.index, rows, shard.count):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        yield f"{first + int(digest[:2], 16) % (last - first + 1):02x}{digest[2:20]}"


def _manifest(artifact: Artifact, rows: int) -> Manifest:
    return Manifest(artifact.stage, artifact.fingerprint, artifact.stage, rows, 0, ())


def measure(folder: Path) -> dict[str, float]:
    """Seconds of each step, the rows that came out, and the peak of memory."""
    plan, store = planned(folder)
    run = Run(plan, store, Progress())
    stages.make_prompts(run)  # They are there: this counts them and cuts the shards.
    dataset = Path(store.folder(plan.dataset))
    work = [
        lambda: assembling.make_preferences(run),
        lambda: assembling.make_dataset(run, RECIPE),
        lambda: export(dataset, folder / "conversational", "conversational", "assembly"),
        lambda: export(dataset, folder / "plain", "plain", "assembly"),
    ]
    found: dict[str, float] = {}
    for step, do in zip(STEPS, work, strict=True):
        started = time.perf_counter()
        do()
        found[step] = time.perf_counter() - started
    manifest = store.manifest(plan.dataset)
    assert manifest is not None
    size = sum(path.stat().st_size for path in (folder / "plain").rglob("*.parquet"))
    return {**found, "rows": manifest.rows, "gib": peak_gib(), "bytes": size / manifest.rows}


def main() -> None:
    """Prepare, measure in a child, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    table = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name), rows)
            command = [sys.executable, __file__, "--measure", name]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        seconds = [found[step] for step in STEPS]
        table.append(
            [
                f"{int(found['rows']):,}",
                *(f"{s:.1f}" for s in seconds),
                f"{sum(seconds):.1f}",
                f"{found['gib']:.2f}",
            ]
        )
        header = ["preferences", *(f"{s} s" for s in STEPS), "all s", "GiB"]
        write_table(
            "assembly", header, table, "Every core makes shards; GiB is one process's most."
        )


if __name__ == "__main__":
    main()
