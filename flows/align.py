"""The align flow: from a finished dataset to trained models, the last of them evaluated."""

from __future__ import annotations

from collections.abc import Callable

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from flows.chain import Trained, train_in_turn
from flows.comparison import evaluation_table
from flows.evaluation import evaluate
from flows.labels import plan_with_answers
from flows.plan import evaluation_artifact, training_artifacts
from flows.progress import Progress, current
from flows.recipe import Recipe, load_recipe
from flows.run_name import run_name
from flows.steps import ALIGNMENT
from preferences.errors import InputError
from preferences.store import Artifact, Store


@flow(name="align", flow_run_name=run_name, validate_parameters=False)
def align(
    recipe: str,
    dataset: str | None = None,
    settings: dict[str, str] | None = None,
    store: str | None = None,
) -> str:
    """Train the recipe's models on a dataset, by default the recipe's own; returns the last one's
    address.

    A dataset that was trained on before is not trained on again, so the same event twice does
    nothing the second time.
    """
    progress = current()
    loaded = load_recipe(recipe, settings)
    if loaded.alignment is None:
        raise InputError(f"{recipe}: no `alignment`; add it to train a model")
    place = Store(store or loaded.runtime.store)
    plan = plan_with_answers(loaded, place)
    source = Artifact("dataset", dataset.rstrip("/").split("/")[-1]) if dataset else plan.dataset
    if place.manifest(source) is None:
        raise InputError(f"{source}: no such finished dataset in {place.url}; build it first")
    trained = training_artifacts(loaded, source)
    for name in trained:
        _train(loaded, place, source, trained, name, progress)
    model = trained[ALIGNMENT]
    if loaded.evaluation is not None:
        comparison = evaluation_artifact(loaded, loaded.evaluation, model)
        as_task("evaluate", lambda: evaluate(loaded, place, source, model, comparison, progress))
        manifest = place.manifest(comparison)
        assert manifest is not None
        create_markdown_artifact(markdown=evaluation_table(manifest.summary), key="evaluation")
    return place.address(model)


def _train(
    recipe: Recipe, place: Store, source: Artifact, trained: Trained, name: str, progress: Progress
) -> None:
    title = "train" if name == ALIGNMENT else f"train {name}"
    as_task(title, lambda: train_in_turn(recipe, place, source, trained, name, progress))


def as_task(name: str, work: Callable[[], None]) -> None:
    """Do a piece of work as a Prefect task."""

    @task(name=name, persist_result=False)
    def do() -> None:
        work()

    do()
