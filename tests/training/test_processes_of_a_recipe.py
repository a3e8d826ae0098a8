"""A recipe whose training takes several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.plan import training_artifacts
from flows.progress import Progress
from flows.recipe import Recipe
from flows.train import train_model
from flows.workload import workload
from preferences.store import Artifact, Store
from tests.training.test_bucket import DATASET, MODEL, with_dataset
from tests.training.test_processes import assert_nearly_equal, change
from training.dpo import DPOConfig

MakeConfig = Callable[..., DPOConfig]


def recipe(config: DPOConfig, **training: Any) -> Recipe:
    values = {
        "name": "red",
        "prompts": {"source": "prompts.jsonl"},
        "candidates": [{"kind": "import", "name": "answers", "source": "answers.jsonl"}],
        "judges": [{"kind": "verifier", "name": "redness", "check": "regex", "pattern": "red red"}],
        "alignment": config.model_dump(mode="json"),
        "runtime": {"training": {"log_steps": 4, "save_steps": 8, **training}},
    }
    return Recipe.model_validate(values)


def test_how_many_processes_train_is_no_part_of_what_is_trained(make_config: MakeConfig) -> None:
    dataset = Artifact("dataset", "da7a")
    one, two = (
        training_artifacts(recipe(make_config(), processes=number), dataset) for number in (1, 2)
    )
    assert one == two


def test_a_recipe_that_its_processes_cannot_share_out_is_refused_before_anything_runs(
    make_config: MakeConfig,
) -> None:
    with pytest.raises(ValidationError, match="processes: 3 cannot share out batches of 4; say"):
        recipe(make_config(), processes=3)
    with pytest.raises(ValidationError, match=r"runtime\.training.*cannot be divided"):
        recipe(make_config(weights="ia3"), processes=2, fsdp={})


def test_two_processes_are_estimated_to_train_in_half_the_time(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "paint thing1"}\n' * 100)
    source = {"source": str(tmp_path / "prompts.jsonl")}

    def stages(processes: int) -> dict[str, float]:
        values = recipe(make_config(), processes=processes).model_dump(mode="json")
        loaded = Recipe.model_validate({**values, "prompts": source})
        return {work.name: work.peak_flops for work in workload(loaded)}

    one, two = stages(1), stages(2)
    assert two["alignment: dpo"] == one["alignment: dpo"] / 2
    # Probes are answered by each of them.
    assert two["alignment: probes"] == one["alignment: probes"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_recipe_trains_in_two_processes_what_it_trains_in_one(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    config = make_config(max_steps=8, learning_rate=1e-3)
    found = []
    for processes in (1, 2):
        store = with_dataset(Store(tmp_path / f"store-{processes}"), red_pairs)
        train_model(recipe(config, processes=processes), store, DATASET, MODEL, Progress())
        manifest = store.manifest(MODEL)
        assert manifest is not None
        folder = Path(store.folder(MODEL)) / "adapter" / "adapter_model.safetensors"
        found.append((manifest.summary, change(load_file(folder))))
    (one, alone), (two, both) = found
    assert (two["steps"], two["update"], two["probes"]) == (8, 4, one["probes"])
    assert all(probe["win_rate"] is not None for probe in two["probes"])
    assert two["held_out"]["pairs"] == 24
    assert_nearly_equal(both, alone, load_file(Path(config.model) / "model.safetensors"))
