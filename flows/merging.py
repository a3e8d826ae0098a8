"""A trained model as one folder that anything serves, with a card that tells its lineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter

from flows.chain import located
from flows.plan import Plan, training_artifacts
from flows.running import planned
from flows.train import local_folder
from preferences.errors import InputError
from preferences.estimate import Estimate
from preferences.hub import push_to_hub
from preferences.store import Store
from training.merge import merge
from training.model_card import model_card
from training.models import Dtype, saved_folder
from training.run import RunFolder


def merge_model(
    recipe: Path,
    output: Path,
    settings: Mapping[str, str],
    store: str | None,
    dtype: str,
    repository: str | None,
    private: bool,
) -> Iterator[str]:
    """Yields a line for each thing that was done."""
    if dtype not in get_args(Dtype):
        raise InputError(f"--dtype {dtype}: say {' or '.join(get_args(Dtype))}")
    numbers: Dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    plan, place = planned(recipe, settings, store)
    alignment = plan.recipe.alignment
    if alignment is None or plan.alignment is None:
        raise InputError(f"{recipe}: no `alignment`, so there is no model to merge")
    if place.manifest(plan.alignment) is None:
        raise InputError(f"{plan.recipe.name}: not trained yet; run `pairwright run {recipe}`")
    base = located(plan.recipe, place, training_artifacts(plan.recipe, plan.dataset)).config
    with local_folder(place, plan.alignment) as folder:
        merge(
            base.model,
            folder / saved_folder(alignment.weights),
            output,
            numbers,
            card=_card(plan, place, folder, recipe.read_text(encoding="utf-8"), numbers),
            revision=base.revision,
        )
    yield f"Wrote {output}, in {dtype}"
    if repository is not None:
        yield f"Pushed to {push_to_hub(output, repository, 'model', private)}"


def _card(plan: Plan, place: Store, folder: Path, recipe_text: str, dtype: Dtype) -> str:
    result = RunFolder(folder).result()
    assert result is not None  # A finished artifact has one.
    manifests = [m for _, a in plan.artifacts if (m := place.manifest(a)) is not None]
    return model_card(
        plan.recipe.name,
        result,
        [m for m in manifests if m.stage != "evaluation"],
        recipe_text,
        evaluation=_measured(plan, place),
        license=plan.recipe.license,
        description=plan.recipe.description,
        merged=dtype,
    )


def _measured(plan: Plan, place: Store) -> dict[str, Estimate]:
    """What the evaluation found of the trained model, by name."""
    manifest = place.manifest(plan.evaluation) if plan.evaluation else None
    if manifest is None:
        return {}
    told = {name: after for name, (_, after) in manifest.summary["checks"].items()}
    told["win rate"] = manifest.summary["win_rate"]
    told["win rate at equal lengths"] = manifest.summary["win_rate_at_equal_lengths"]
    estimate = TypeAdapter(Estimate)
    return {name: estimate.validate_python(v) for name, v in told.items() if v is not None}
