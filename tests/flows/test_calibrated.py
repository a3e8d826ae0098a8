"""People's verdicts calibrate the judges of a recipe, or it is said why they do not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import assembling, stages
from flows.plan import make_plan
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.run import Run
from preferences.records import Preference, Ranking
from preferences.store import Store

# A judge who is all but certain each time, with whom people agree three times of four.
SURE, RIGHT = 0.98, 0.75


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def recipe(folder: Path, labels: int, **more: Any) -> Path:
    """150 prompts with two answers each, all judged, some of them by people too."""
    draw = random.Random(1)
    prompts = [f"question {n}" for n in range(150)]
    answers = [
        {"prompt": prompt, "model": model, "response": f"{model} answers {prompt}"}
        for prompt in prompts
        for model in ("one", "two")
    ]
    judged, people = [], []
    for number, prompt in enumerate(prompts):
        first, second = draw.sample(["one", "two"], 2)
        says = draw.choice([SURE, 1 - SURE])
        judged.append({"prompt": prompt, "first": first, "second": second, "probability": says})
        if number < labels:
            agrees = number % 4 != 0
            verdict = "first" if agrees == (says > 0.5) else "second"
            people.append({"prompt": prompt, "first": first, "second": second, "verdict": verdict})
    judges: list[dict[str, Any]] = [
        {"kind": "import", "name": "judge", "verdict_in": "probability"}
        | {"source": write(folder / "judged.jsonl", judged)},
    ]
    if labels:
        source = write(folder / "people.jsonl", people)
        judges.append({"kind": "import", "name": "people", "people": True, "source": source})
    source = write(folder / "answers.jsonl", answers)
    text = {
        "name": "calibrated",
        "candidates": [{"kind": "import", "name": "answers", "source": source}],
        "judges": judges,
        "pairs": {"min_probability": 0.5},
        "split": {"test": 0.2},
        "runtime": {"store": str(folder / "store")},
        **more,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(text))
    return folder / "recipe.yaml"


def build(path: Path) -> Run:
    loaded = load_recipe(path)
    run = Run(make_plan(loaded), Store(loaded.runtime.store), Progress())
    stages.make_prompts(run)
    stages.make_candidates(run, 0)
    for number in range(len(run.plan.judgments)):
        stages.make_judgments(run, number)
    stages.make_rankings(run)
    assembling.make_preferences(run)
    assembling.make_dataset(run, path.read_text())
    return run


def summary(run: Run) -> dict[str, Any]:
    manifest = run.store.manifest(run.plan.rankings)
    assert manifest is not None
    return manifest.summary


def card(run: Run) -> str:
    text = run.store.read_text(f"{run.store.folder(run.plan.dataset)}/README.md")
    assert text is not None
    return text


def unlabelled(run: Run) -> list[float]:
    """Probabilities of the pairs that no person judged."""
    rankings = {r.prompt_id: r for r in run.store.read(run.plan.rankings, Ranking)}
    preferences = run.store.read(run.plan.preferences, Preference)
    return [p.probability for p in preferences if len(rankings[p.prompt_id].judgment_ids) == 1]


def test_without_people_the_card_says_uncalibrated(tmp_path: Path) -> None:
    run = build(recipe(tmp_path, 0))
    assert summary(run)["calibration"] is None
    assert "The probabilities are uncalibrated: 0 pairs on 0 prompts were judged" in card(run)


def test_too_few_people_do_not_calibrate_and_the_card_says_what_is_missing(
    tmp_path: Path,
) -> None:
    run = build(recipe(tmp_path, 12))
    assert (
        "uncalibrated: 12 pairs on 12 prompts were judged by people and by judges; "
        "calibration needs 50 on 20."
    ) in card(run)
    rankings = list(run.store.read(run.plan.rankings, Ranking))
    assert sum(len(r.judgment_ids) == 2 for r in rankings) == 12


@pytest.mark.parametrize("method", ["logistic", "isotonic"])
def test_people_bring_a_judge_that_is_too_sure_to_what_they_agree_with(
    tmp_path: Path, method: str
) -> None:
    run = build(recipe(tmp_path, 120, calibration=method))
    found = summary(run)["calibration"]
    assert found["labels"] == found["prompts"] == 120
    # Every pair has the judge's same log-odds, so each fold learns people's share of agreement.
    assert found["before"]["ece"] > found["after"]["ece"]
    assert found["after"]["nll"] < found["before"]["nll"]
    left = unlabelled(run)
    assert len(left) == 30
    for probability in left:
        assert probability == pytest.approx(RIGHT, abs=0.09)
    assert "calibrated on 120 pairs judged by people, of 120 prompts" in card(run)
    folder = run.store.folder(run.plan.dataset)
    assert "![Reliability diagram](reliability.svg)" in card(run)
    assert (run.store.read_text(f"{folder}/reliability.svg") or "").startswith("<svg")


def test_what_people_said_of_a_pair_itself_moves_it_further(tmp_path: Path) -> None:
    run = build(recipe(tmp_path, 120))
    rankings = {r.prompt_id: r for r in run.store.read(run.plan.rankings, Ranking)}
    preferences = list(run.store.read(run.plan.preferences, Preference))
    asked = [p for p in preferences if len(rankings[p.prompt_id].judgment_ids) == 2]
    assert max(p.probability for p in asked) > max(unlabelled(run))
    # A person against the judge: what is left is close to even.
    assert min(p.probability for p in asked) < 0.65
