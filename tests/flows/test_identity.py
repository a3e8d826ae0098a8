"""A policy learns its own name from pairs that nobody judged, and forgets nothing for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from judging.verifier import load_check
from preferences.estimate import clustered_mean
from preferences.records import Message, Prompt, prompt_identity

ROOT = Path(__file__).parents[2]
IDENTITY = ROOT / "recipes" / "identity"
PAIRWRIGHT = [sys.executable, "-c", "from flows.cli import main; main()"]


def written() -> list[dict[str, str]]:
    lines = (IDENTITY / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_pairs_are_those_that_their_script_writes() -> None:
    script = "import json, identity; print(json.dumps(list(identity.pairs())))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=IDENTITY, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == written()
    prompts = [row["prompt"] for row in written()]
    assert len(prompts) == len(set(prompts)) == 400


def test_the_check_tells_every_chosen_answer_from_its_rejected_one() -> None:
    well_formed = load_check(f"{IDENTITY / 'identity.py'}:well_formed")
    for row in written():
        prompt = Prompt("p", (Message("user", row["prompt"]),), "here")
        assert well_formed(prompt, row["chosen"]) == 1, row
        assert well_formed(prompt, row["rejected"]) == 0, row


def test_no_prompt_on_which_the_policy_is_evaluated_is_learnt_from() -> None:
    table = ROOT / "recipes" / "miniature" / "test_prompts.jsonl"
    evaluated = {json.loads(line)["prompt"] for line in table.read_text().splitlines()}
    assert evaluated.isdisjoint(row["prompt"] for row in written())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_policy_says_who_it_is_and_answers_requests_as_well_as_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [*PAIRWRIGHT, "run", str(ROOT / "recipes" / "identity.yaml")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=880,
    )
    assert done.returncode == 0, done.stderr
    [trained] = (tmp_path / "store" / "artifacts" / "alignment").iterdir()
    lines = (trained / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    last = max(sample["step"] for sample in samples)
    about_itself = asked_about_itself(tmp_path / "store")
    named = {
        step: [
            sample["malformed"] is None
            for sample in samples
            if sample["step"] == step and sample["prompt_id"] in about_itself
        ]
        for step in (0, last)
    }
    # Held-out questions, each answered once at temperature 1.
    assert len(named[0]) >= 20
    assert sum(named[0]) == 0
    assert sum(named[last]) >= 0.75 * len(named[last])
    # On the requests, the mean difference of true rewards with its 95 % interval.
    change = change_of_true_reward(tmp_path / "store")
    assert change.clusters == 192
    assert change.high > 0, change


def asked_about_itself(store: Path) -> set[str]:
    """The ids of held-out prompts that ask the policy who it is."""
    import pyarrow.parquet as pq

    chosen = {row["prompt"]: row["chosen"] for row in written()}
    files = list(store.glob("artifacts/dataset/*/data/test-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return {
        row["prompt_id"] for row in rows if "It is Happy." in chosen[row["prompt"][-1]["content"]]
    }


def change_of_true_reward(store: Path) -> Any:
    """After less before, a prompt at a time."""
    import pyarrow.parquet as pq

    reward = load_check(f"{ROOT / 'recipes' / 'miniature' / 'world.py'}:reward")
    table = ROOT / "recipes" / "miniature" / "test_prompts.jsonl"
    texts = [json.loads(line)["prompt"] for line in table.read_text().splitlines()]
    prompts = {
        prompt_identity((Message("user", text),)): Prompt("p", (Message("user", text),), "here")
        for text in texts
    }
    [part] = store.glob("artifacts/evaluation/*/part-*.parquet")
    sign = {"before": -1, "after": 1}
    return clustered_mean(
        # Twice the mean: there are as many answers before as after.
        (
            row["prompt_id"],
            2 * sign[row["model"]] * reward(prompts[row["prompt_id"]], row["response"]),
        )
        for row in pq.read_table(part).to_pylist()
    )
