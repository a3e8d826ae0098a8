"""The align flow: from a finished dataset to a trained and evaluated model."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from flows.evaluation import evaluate
from flows.plan import alignment_artifact, evaluation_artifact, make_plan
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.training import train_model
from preferences.card import markdown_table
from preferences.errors import InputError
from preferences.store import Artifact, Manifest, Store


@flow(name="align", flow_run_name="align-{recipe}", validate_parameters=False)
def align(
    recipe: str,
    dataset: str | None = None,
    settings: dict[str, str] | None = None,
    store: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Train the recipe's model on a dataset, by default the recipe's own; returns its address.

    A dataset that was trained on before is not trained on again, so the same event twice does
    nothing the second time.
    """
    progress = progress or Progress()
    loaded = load_recipe(recipe, settings)
    if loaded.alignment is None:
        raise InputError(f"{recipe}: no `alignment`; add it to train a model")
    place = Store(store or loaded.runtime.store)
    plan = make_plan(loaded)
    source = Artifact("dataset", dataset.rstrip("/").split("/")[-1]) if dataset else plan.dataset
    if place.manifest(source) is None:
        raise InputError(f"{source}: no such finished dataset in {place.url}; build it first")
    model = alignment_artifact(loaded, source)
    task(train_model, name="train", persist_result=False)(loaded, place, source, model, progress)
    if loaded.evaluation is not None:
        comparison = evaluation_artifact(loaded, loaded.evaluation, model)
        task(evaluate, name="evaluate", persist_result=False)(
            loaded, place, source, model, comparison, progress
        )
        manifest = place.manifest(comparison)
        assert manifest is not None
        create_markdown_artifact(markdown=evaluation_table(manifest), key="evaluation")
    return place.address(model)


def evaluation_table(manifest: Manifest) -> str:
    """Before and after, with 95 % intervals."""
    rows = [[name, *map(interval, values)] for name, values in manifest.summary["checks"].items()]
    rows.append(["answers cut short", *map(_percent, manifest.summary["truncated"])])
    rows.append(["mean characters", *(f"{x:,.0f}" for x in manifest.summary["characters"])])
    win_rate = manifest.summary["win_rate"]
    if win_rate:
        rows.append([f"win rate by {manifest.summary['judge']}", "0.5", interval(win_rate)])
    return markdown_table(["", "before", "after"], rows)


def interval(estimate: dict[str, Any] | None) -> str:
    """`0.532 ± 0.012`."""
    if estimate is None:
        return ""
    return f"{estimate['mean']:.3f} ± {(estimate['high'] - estimate['low']) / 2:.3f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


