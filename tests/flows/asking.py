"""Small recipes whose models are a fake endpoint, carried out here and without Prefect."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from flows.build import _make_all
from flows.labels import plan_with_answers
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.run import Run
from preferences.store import Store
from tests.generation.endpoint import Answer, Endpoint, refusal, reply

KEY = "sk-very-secret"
CALL = 15e-6
"""What a call costs: 10 prompt tokens and 5 completion tokens, at 1 a million each."""
RUBRIC = "{{prompt}}\n<first>{{first}}</first>\n<second>{{second}}</second>\nA or B?"


class Models:
    """Policy and judges behind one endpoint; notes what it answered and how often.

    The policy's answers follow from its seed, so that they differ; a judge prefers the answer
    that stands first in the alphabet. `down` says of a call whether the endpoint fails it.
    """

    def __init__(self, said: Callable[[str, int], str] | None = None) -> None:
        self.said = said or (lambda prompt, seed: f"{seed} is my answer to {prompt}")
        self.down: Callable[[dict[str, Any]], bool] = lambda body: False
        self.answered: Counter[str] = Counter()
        """Each distinct call that was answered, and how often it was."""
        self.by_model: Counter[str] = Counter()
        """Answered calls of each model."""
        self.failed = 0
        self._lock = threading.Lock()

    def __call__(self, body: dict[str, Any], number: int) -> Answer:
        with self._lock:
            if self.down(body):
                self.failed += 1
                return refusal(503, "down")
            self.answered[json.dumps(body, sort_keys=True)] += 1
            self.by_model[body["model"]] += 1
        text = body["messages"][-1]["content"]
        if body["model"] == "policy":
            return reply(self.said(text, body["seed"]))
        first = text[text.index("<first>") + 7 : text.index("</first>")]
        second = text[text.index("<second>") + 8 : text.index("</second>")]
        return reply("A" if first < second else "B")

    @property
    def asked_twice(self) -> int:
        """How many calls were answered more than once, and so paid for again."""
        return sum(times > 1 for times in self.answered.values())


@contextmanager
def serving(models: Models) -> Iterator[Endpoint]:
    """The endpoint, while the block runs."""
    endpoint = Endpoint(models)
    # Headers and body go out in two writes; held back until acknowledged, a call takes 40 ms.
    endpoint._server.RequestHandlerClass.disable_nagle_algorithm = True  # type: ignore[attr-defined]
    try:
        yield endpoint
    finally:
        endpoint.close()


def write_recipe(
    folder: Path,
    url: str,
    prompts: int | Sequence[str] = 40,
    judges: Sequence[str] = ("judge",),
    samples: int = 2,
    engine: Mapping[str, Any] | None = None,
    shard_size: int = 10,
    **changes: Any,
) -> Path:
    """A recipe that samples from `policy` and asks each of `judges`."""
    texts = [f"question {n}" for n in range(prompts)] if isinstance(prompts, int) else prompts
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "rubric.md").write_text(RUBRIC)
    runtime = {"base_url": url, "retries": 0, "concurrency": 4, **(engine or {})}
    values: dict[str, Any] = {
        "name": "asking",
        "prompts": {"source": "prompts.jsonl"},
        "candidates": [
            {
                "kind": "sample",
                "name": "policy",
                "engine": "openai",
                "model": "policy",
                "samples": samples,
                "sampling": {"max_tokens": 10},
            }
        ],
        "judges": [
            {
                "kind": "pairwise",
                "name": name,
                "engine": "openai",
                "model": name,
                "rubric": "rubric.md",
            }
            for name in judges
        ],
        "pairs": {"min_probability": 0.5},
        "split": {"test": 0.3},
        "runtime": {
            "shard_size": shard_size,
            "engines": {name: runtime for name in ("policy", *judges)},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def prepared(recipe: Path, store: Store | Path | str) -> Run:
    """The recipe, ready to be carried out in a store."""
    place = store if isinstance(store, Store) else Store(store)
    return Run(plan_with_answers(load_recipe(recipe, dataset_only=True), place), place, Progress())


def carry_out(recipe: Path, store: Store | Path | str) -> Run:
    """Build the recipe's dataset in this process, stage after stage."""
    run = prepared(recipe, store)
    _make_all(run, recipe.read_text())
    return run


def parts(store: Path | str) -> dict[str, Any]:
    """Every table of a store's artifacts, by its path, with the records' own columns."""
    root = Path(store) / "artifacts"
    return {
        str(path.relative_to(root)): pq.read_table(path) for path in sorted(root.rglob("*.parquet"))
    }


def digest(text: str) -> str:
    """A short name for a long text."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
