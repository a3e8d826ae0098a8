"""Running a recipe here and now: nothing if all is done, else the flows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows import prefect_settings
from flows.check import check_inputs
from flows.labels import plan_with_answers, take_up
from flows.plan import Plan
from flows.progress import Advance, Progress, telling
from flows.recipe import Recipe, load_recipe
from preferences.errors import Waiting
from preferences.judge_tables import NamedTable
from preferences.store import Store


def run_now(
    recipe: Path,
    settings: Mapping[str, str],
    store: str | None,
    as_json: bool,
    dataset_only: bool,
) -> dict[str, Advance]:
    """Carry a recipe out; returns what each stage that ran took."""
    progress = Progress("json" if as_json else "people")
    take_up(*loaded(recipe, settings, store, dataset_only), progress.say)
    plan, place = planned(recipe, settings, store, dataset_only)
    if place.manifest(plan.artifacts[-1][1]) is not None:
        progress.say(f"{plan.recipe.name}: all is done already, in {place.url}")
        return {}
    check_inputs(plan.recipe)
    with _flows(progress):
        from flows.align import align
        from flows.build import build

        dataset = build(str(recipe), dict(settings), store)
        if dataset is None:
            raise Waiting(f"{plan.recipe.name}: the dataset waits for people; see above")
        if plan.alignment is not None:
            align(str(recipe), dataset, dict(settings), store)
    return progress.timings


def align_now(
    recipe: Path, dataset: str | None, settings: Mapping[str, str], store: str | None, as_json: bool
) -> str:
    """Train and evaluate; returns the address of the model."""
    with _flows(Progress("json" if as_json else "people")):
        from flows.align import align

        return str(align(str(recipe), dataset=dataset, settings=dict(settings), store=store))


def iterate_now(
    recipe: Path,
    rounds: int | None,
    settings: Mapping[str, str],
    store: str | None,
    as_json: bool,
) -> tuple[dict[str, Any], NamedTable]:
    """Go round, if that is not done; the rounds for a program, and as a table for people."""
    from flows.rounds import go_round, policy_of, rounds_of, rounds_table

    progress = Progress("json" if as_json else "people")
    checked, place = loaded(recipe, settings, store)
    config = rounds_of(checked, rounds)
    done, found = go_round(checked, place, config, lambda path: False)
    if found.over:
        progress.say(f"{checked.name}: all rounds are done already, in {place.url}")
    else:
        check_inputs(checked)
        with _flows(progress):
            from flows.iterate import iterate

            iterate(str(recipe), rounds, dict(settings), store)
        done, found = go_round(checked, place, config, lambda path: False)
    if not found.over:
        raise Waiting(f"{checked.name}: round {len(done) + 1} waits for people; see above")
    kept = policy_of(Path(done[found.kept - 1].recipe), place) if found.kept else None
    document = {
        "recipe": checked.name,
        "store": place.url,
        "rounds": [asdict(one) for one in done],
        "kept": found.kept,
        "reason": found.reason,
        "model": str(kept or checked.model_before()[0]),
    }
    return document, rounds_table(done, found)


def planned(
    recipe: Path, settings: Mapping[str, str], store: str | None, dataset_only: bool = False
) -> tuple[Plan, Store]:
    """The plan of a recipe and the store it is carried out in."""
    checked, place = loaded(recipe, settings, store, dataset_only)
    return plan_with_answers(checked, place), place


def loaded(
    recipe: Path, settings: Mapping[str, str], store: str | None, dataset_only: bool = False
) -> tuple[Recipe, Store]:
    """A recipe and the store it is carried out in."""
    checked = load_recipe(recipe, settings, dataset_only)
    return checked, Store(store or checked.runtime.store)


def status_document(recipe: Path, settings: Mapping[str, str], store: str | None) -> dict[str, Any]:
    """Each stage for a program: `done`, `begun` or `owed`, and its rows where it is done."""
    plan, place = planned(recipe, settings, store)
    stages = []
    for name, artifact in plan.artifacts:
        manifest = place.manifest(artifact)
        begun = "begun" if place.fs.exists(place.folder(artifact)) else "owed"
        stages.append(
            {
                "name": name,
                "artifact": str(artifact),
                "state": begun if manifest is None else "done",
                "rows": manifest.rows if manifest else None,
                "dropped": manifest.dropped if manifest else None,
            }
        )
    return {"recipe": plan.recipe.name, "store": place.url, "stages": stages}


def report_document(
    recipe: Path, settings: Mapping[str, str], store: str | None, dataset_only: bool = False
) -> dict[str, Any]:
    """What came out, for a program: of each finished stage what its manifest says."""
    plan, place = planned(recipe, settings, store, dataset_only)
    finished = [(name, a, m) for name, a in plan.artifacts if (m := place.manifest(a)) is not None]
    stages = [
        {
            "name": name,
            "artifact": str(artifact),
            "rows": manifest.rows,
            "dropped": manifest.dropped,
            "inputs": list(manifest.inputs),
            "summary": manifest.summary,
        }
        for name, artifact, manifest in finished
    ]
    return {"recipe": plan.recipe.name, "store": place.url, "stages": stages}


@contextmanager
def _flows(progress: Progress) -> Iterator[None]:
    """Prefect, quietly: its server if one is set, else an ephemeral one for this run."""
    prefect_settings.apply()
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        # What fails is raised and told in one line; the traceback goes to Prefect's pages alone.
        logging.getLogger(name).propagate = False
    with telling(progress):
        yield
