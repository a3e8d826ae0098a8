"""Whatever trained is compared with its start, by an engine that can answer as it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.evaluation import evaluate
from flows.merging import merge_model
from flows.plan import make_plan
from flows.progress import Progress
from flows.recipe import Recipe, load_recipe
from flows.rounds import rounds_of
from preferences.errors import InputError
from preferences.records import Candidate
from tests.flows.test_pipeline import pairwright, small_miniature
from tests.flows.test_recipe_keys import carry_out
from tests.generation.tiny_model import write_model


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("policy"))


def write_recipe(folder: Path, policy: Path, weights: str) -> dict[str, Any]:
    """The longer answer is chosen, and a check that likes length is the judge."""
    rows = [
        {"prompt": f"Say {n}.", "model": model, "response": text}
        for n in range(12)
        for model, text in (("long", f"the {n} the the"), ("short", f"{n}"))
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "check.py").write_text(
        "def length(prompt, response):\n    return min(len(response), 40) / 40\n"
    )
    return {
        "name": "every",
        "candidates": [{"kind": "import", "name": "answers", "source": "answers.jsonl"}],
        "judges": [{"kind": "verifier", "name": "length", "check": "check.py:length"}],
        "pairs": {"min_probability": 0.5},
        "split": {"test": 0.4},
        "alignment": {
            "method": "sft",
            "model": str(policy),
            "weights": weights,
            "virtual_tokens": 5,
            "bottleneck": {"size": 8},
            "max_steps": 8,
            "batch_size": 4,
            "learning_rate": 0.3 if "tuning" in weights else 1e-2,
            "dtype": "float32",
            "gradient_checkpointing": False,
            "probe": None,
        },
        "evaluation": {"sampling": {"max_tokens": 8}, "checks": {"true_reward": "check.py:length"}},
    }


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "weights",
    ["bottleneck", "prefix_tuning", pytest.param("prompt_tuning", marks=pytest.mark.slow)],
)
def test_what_cannot_be_merged_is_evaluated_by_transformers_and_that_is_said(
    weights: str,
    policy: Path,
    tmp_path: Path,
    without_children: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def here(what: str, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr("flows.evaluation.in_child", here)
    values = write_recipe(tmp_path, policy, weights)
    store = carry_out(tmp_path, {**values, "evaluation": None})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    plan, said = make_plan(load_recipe(tmp_path / "recipe.yaml")), io.StringIO()
    assert plan.alignment is not None
    assert plan.evaluation is not None
    progress = Progress("people", said)
    evaluate(plan.recipe, store, plan.dataset, plan.alignment, plan.evaluation, progress)
    assert "transformers answers for both models" in said.getvalue()
    assert f"{weights} cannot be merged" in said.getvalue()
    manifest = store.manifest(plan.evaluation)
    assert manifest is not None
    told = manifest.summary
    before, after = told["checks"]["true_reward"]
    assert before["mean"] != after["mean"]
    assert told["win_rate"]["clusters"] == told["kl"]["clusters"] == told["prompts"] > 1
    # Without its adapter, the policy would be the reference. The mean itself can be of either sign:
    # what random weights say is no text, and comes back as other tokens.
    assert told["kl"]["mean"] != 0
    answers = list(store.read(plan.evaluation, Candidate))
    assert {a.model for a in answers} == {"before", "after"}

    with pytest.raises(InputError, match=f"{weights} cannot be merged .*publish the adapter"):
        list(merge_model(tmp_path / "recipe.yaml", tmp_path / "out", {}, store.url, "float32",
                         None, False))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_rounds_start_from_merged_models(policy: Path, tmp_path: Path) -> None:
    values = write_recipe(tmp_path, policy, "prefix_tuning")
    source = {"kind": "sample", "name": "policy", "model": str(policy)}
    recipe = Recipe.model_validate({**values, "candidates": [source], "prompts": {"source": "x"}})
    with pytest.raises(InputError, match=r"prefix_tuning cannot be merged, .* say lora or full"):
        rounds_of(recipe, None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_miniature_goes_the_whole_way_with_a_prefix(tmp_path: Path) -> None:
    path = small_miniature(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["alignment"] |= {"weights": "prefix_tuning", "gradient_checkpointing": False}
    values["alignment"] |= {"learning_rate": 1e-2, "max_steps": 8}
    del values["evaluation"]["engine"]  # by default vLLM
    path.write_text(yaml.safe_dump(values))
    run = pairwright("run", path, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "transformers answers for both models; prefix_tuning cannot be merged" in run.stderr
    for told in ("Before and after, 20 prompts", "true reward", "KL from the first model"):
        assert told in run.stdout
    merged = pairwright("merge", path, "merged", cwd=tmp_path)
    assert merged.returncode == 2
    assert "publish the adapter folder itself (hf upload)" in " ".join(merged.stderr.split())
