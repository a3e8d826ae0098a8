"""Ranked lists from a recipe: four answers a prompt, a judge, pairs, and training on the lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from preferences.store import Store
from tests.flows.test_pipeline import pairwright
from tests.flows.test_recipe_keys import carry_out
from tests.generation.tiny_model import write_model

PROMPTS = 12


def write_recipe(folder: Path) -> dict[str, Any]:
    """The longer the better; of every third prompt an answer is too long to train on, and of every
    fourth two answers are as long as each other."""
    sizes = [
        {"a": 0, "b": 4, "c": 4 if n % 4 == 0 else 8, "d": 200 if n % 3 == 0 else 12}
        for n in range(PROMPTS)
    ]
    rows = [
        {"prompt": f"Say {n}.", "model": model, "response": f"{n:02}" + " the" * size + f" {model}"}
        for n, of in enumerate(sizes)
        for model, size in of.items()
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "check.py").write_text(
        "def length(prompt, response):\n    return min(len(response), 100) / 100\n"
    )
    return {
        "name": "ranked",
        "candidates": [{"kind": "import", "name": "answers", "source": "answers.jsonl"}],
        "judges": [{"kind": "verifier", "name": "length", "check": "check.py:length"}],
        "pairs": {"policy": "all_pairs", "min_probability": 0.5},
        "split": {"test": 0.4},
        "alignment": {
            "method": "ranked_dpo",
            "model": str(write_model(folder / "policy")),
            "loss": "plackett_luce",
            "beta": 0.5,
            "max_steps": 6,
            "max_length": 96,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "dtype": "float32",
            "gradient_checkpointing": False,
            "probe": None,
        },
        "runtime": {"store": str(folder / "store")},
    }


def check(folder: Path) -> None:
    """What the store holds of the training, against the pairs of its dataset."""
    (manifest,) = Store(folder / "store").manifests("alignment")
    artifacts = folder / "store" / "artifacts"
    run = artifacts / "alignment" / manifest.fingerprint
    result = json.loads((run / "result.json").read_text())
    prompts = {
        split: {
            row["prompt_id"]
            for part in artifacts.glob(f"dataset/*/data/{split}-*.parquet")
            for row in pq.read_table(part).to_pylist()
        }
        for split in ("train", "test")
    }
    assert {split: result[split]["kept"] for split in prompts} == {
        split: len(ids) for split, ids in prompts.items()
    }
    # The answers that are too long are left out, and their prompts are trained on.
    assert sum(result[split]["answers_left_out"] for split in prompts) == PROMPTS // 3
    dropped = [json.loads(line) for line in (run / "dropped.jsonl").open()]
    assert [row["reason"] for row in dropped] == ["answer_too_long"] * (PROMPTS // 3)
    assert result["evaluation"]["eval_rewards/accuracies"] > 0.6
    assert (run / "adapter" / "adapter_model.safetensors").exists()


def test_ranked_answers_of_a_recipe_are_trained_on_as_lists(
    tmp_path: Path, without_children: None, capsys: pytest.CaptureFixture[str]
) -> None:
    carry_out(tmp_path, write_recipe(tmp_path))
    check(tmp_path)
    said = capsys.readouterr().err
    assert "forward pass: shared" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_by_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(write_recipe(tmp_path)))
    done = pairwright("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prompts to train on" in done.stderr + done.stdout
    check(tmp_path)
