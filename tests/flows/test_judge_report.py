"""Agreement of judges, from imported verdicts to the card and the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from flows import assembling, stages
from flows.plan import make_plan
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.report import report_tables
from flows.run import Run
from preferences.store import Store

RECIPE = """
name: agreement
candidates: [{kind: import, name: answers, source: answers.jsonl}]
judges:
  - {kind: import, name: people, source: people.jsonl}
  - {kind: import, name: gpt-4o, source: model.jsonl, verdict_in: probability}
split: {test: 0.2}
runtime: {shard_size: 8}
"""
PROMPTS = 40
CATEGORY = "[/red] code"
"""Any text can be a category, also what a terminal could take for markup."""


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A dataset of forty prompts. The people prefer claude's answer, which is longer, to gpt's.

    The judge is asked in both orders and agrees with the people on three prompts of four.
    """
    folder = tmp_path_factory.mktemp("agreement")
    (folder / "recipe.yaml").write_text(RECIPE)
    answers, people, model = [], [], []
    for n in range(PROMPTS):
        prompt = {"prompt": f"question {n}"}
        category = {"category": CATEGORY if n % 2 else "chat"}
        answers += [
            {**prompt, **category, "model": "gpt-3.5", "response": f"brief {n}"},
            {**prompt, **category, "model": "claude-3", "response": f"at much greater length {n}"},
        ]
        people.append({**prompt, "first": "claude-3", "second": "gpt-3.5", "verdict": "first"})
        wins = 0.9 if n % 4 else 0.2
        model += [
            {**prompt, "first": "claude-3", "second": "gpt-3.5", "probability": wins},
            {**prompt, "first": "gpt-3.5", "second": "claude-3", "probability": 1 - wins},
        ]
    for name, rows in (("answers", answers), ("people", people), ("model", model)):
        write(folder / f"{name}.jsonl", rows)
    plan, store = make_plan(load_recipe(folder / "recipe.yaml")), Store(folder / "store")
    run = Run(plan, store, Progress())
    stages.make_prompts(run)
    stages.make_candidates(run, 0)
    for number in range(2):
        stages.make_judgments(run, number)
    stages.make_rankings(run)
    assembling.make_preferences(run)
    assembling.make_dataset(run, RECIPE)
    return run


def test_the_card_tells_how_far_the_judges_agree(made: Run) -> None:
    assert len(made.shards) > 1
    folder = made.store.folder(made.plan.dataset)
    card = made.store.read_text(f"{folder}/README.md") or ""
    # The judge prefers claude's, the longer answer, on 30 of 40, the people always; its family's
    # are gpt's, which win 10 of 40 with it and none with the people. Asked both ways, each is once
    # the first: one half.
    assert "| gpt-4o | 80 | 0.0% | 100.0% | 50.0% | 75.0% | gpt: 25.0% (0.0%) |" in card
    assert "| people | 40 | 0.0% |  | 100.0% | 100.0% |  |" in card
    assert "| gpt-4o | people | 40 | 75.0% | 75.0% |" in card
    # The ten lie on even prompts, where ten of twenty are agreed on.
    assert "| chat | gpt-4o | people | 20 | 50.0% | 50.0% |" in card
    assert f"| {CATEGORY} | gpt-4o | people | 20 | 100.0% | 100.0% |" in card


def test_the_terminal_tells_the_same(made: Run) -> None:
    console = Console(width=200, record=True)
    folder = Path(made.store.folder(made.plan.dataset)).parents[2]
    for part in report_tables(folder.parent / "recipe.yaml", {}, str(folder), dataset_only=True):
        console.print(part)
    text = console.export_text()
    for words in ("Agreement by category", CATEGORY, "gpt: 25.0% (0.0%)", "75.0%", "all judges"):
        assert words in text
