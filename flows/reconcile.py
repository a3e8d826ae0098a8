"""The reconciler: what a lost event should have started, it starts."""

from __future__ import annotations

from prefect import flow
from prefect.deployments import run_deployment

from flows.deploy import current_recipe, deployments
from flows.labels import plan_with_answers
from flows.recipe import load_recipe
from preferences.errors import PairwrightError
from preferences.store import Store


@flow(name="reconcile", validate_parameters=False)
def reconcile(store: str) -> list[str]:
    """Start the alignment of every finished dataset that has none; returns what was started."""
    started = []
    for name, deployment in deployments(Store(store)):
        try:
            place = Store(deployment.store)
            recipe, settings = current_recipe(deployment)
            plan = plan_with_answers(load_recipe(recipe, settings), place)
        except PairwrightError as error:
            print(f"{name}: {error}")
            continue
        last = plan.evaluation or plan.alignment
        if last is None or place.manifest(plan.dataset) is None or place.manifest(last):
            continue
        parameters = {
            "recipe": deployment.recipe,
            "settings": deployment.settings,
            "store": deployment.store,
        }
        flow_name = "iterate"
        if recipe == deployment.recipe:  # and not one of its rounds
            flow_name = "align"
            parameters["dataset"] = place.address(plan.dataset)
        # The same key is the same run, however often this is asked.
        run_deployment(
            f"{flow_name}/{name}",
            parameters=parameters,
            idempotency_key=f"{plan.dataset.fingerprint}-{last.fingerprint}",
            timeout=0,
        )
        started.append(name)
    return started
