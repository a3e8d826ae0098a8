"""The build flow: from a recipe to a finished dataset, read top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed

from flows import assembling, stages
from flows.events import dataset_finished
from flows.labels import plan_with_answers, take_up
from flows.progress import current
from flows.recipe import Recipe, load_recipe
from flows.run import Make, Run
from flows.run_name import run_name
from preferences.errors import ServiceError
from preferences.store import Store


@flow(name="build", flow_run_name=run_name, validate_parameters=False)
def build(
    recipe: str,
    settings: dict[str, str] | None = None,
    store: str | None = None,
) -> str | None:
    """Make the dataset of a recipe file; returns its address, or None while it waits for people.

    What is done is not done again; a finished dataset emits `preference-dataset.finished`.
    """
    loaded = load_recipe(recipe, settings, dataset_only=True)
    take_up(loaded, Store(store or loaded.runtime.store), current().say)
    run = start(loaded, store)
    text = Path(recipe).read_text(encoding="utf-8")
    new = run.store.manifest(run.plan.dataset) is None
    if new:
        if not _make_all(run, text):
            _show_stages(run)
            # A state of its own name, so that Prefect's pages do not call this run the end.
            return cast(None, Completed(name="Waiting", message="for people's answers", data=None))
    elif loaded.people is not None:
        stages.make_prompts(run)  # Says how the shards are cut.
        stages.ask_people(run)
    dataset = run.store.manifest(run.plan.dataset)
    assert dataset is not None
    address = run.store.address(run.plan.dataset)
    _show(run)
    if new:
        dataset_finished(dataset, address, recipe, settings or {})
    return address


def start(recipe: Recipe, store: str | None) -> Run:
    """A run whose stages are Prefect tasks, one for each shard."""
    place = Store(store or recipe.runtime.store)
    return Run(plan_with_answers(recipe, place), place, current(), as_task)


def as_task(name: str, make: Make) -> Make:
    """A stage's function as a task; the run is named after the stage and the shard."""

    @task(name=name, task_run_name=name + " {part}", persist_result=False)
    def make_shard(shard: Any, part: str) -> None:
        make(shard)

    return lambda shard: make_shard(shard, shard.suffix)


def _make_all(run: Run, recipe_text: str) -> bool:
    """Whether the dataset is made; if not, it waits for people."""
    stages.make_prompts(run)
    for number in range(len(run.plan.candidates)):
        stages.make_candidates(run, number)
    failures = []
    for number in range(len(run.plan.judgments)):
        try:
            stages.make_judgments(run, number)
        except ServiceError as error:
            failures.append(error)  # A judge that is down loses nothing of the others.
    if failures:
        raise failures[0]
    stages.make_answers(run)
    stages.make_routes(run)
    if not stages.ask_people(run):
        return False
    stages.make_rankings(run)
    assembling.make_preferences(run)
    assembling.make_dataset(run, recipe_text)
    return True


def _show(run: Run) -> None:
    """What the Prefect UI shows of a build: a table of the stages, and the card."""
    _show_stages(run)
    card = run.store.read_text(f"{run.store.folder(run.plan.dataset)}/README.md") or ""
    create_markdown_artifact(markdown=card.partition("\n---\n")[2], key="dataset-card")


def _show_stages(run: Run) -> None:
    rows = [
        {"stage": name, "rows": m.rows, "dropped": m.dropped, "artifact": str(artifact)}
        for name, artifact in run.plan.artifacts
        if (m := run.store.manifest(artifact)) is not None
    ]
    name = run.plan.recipe.name
    create_table_artifact(table=rows, key="stages", description=f"Stages of {name}")
