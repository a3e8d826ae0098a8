"""The reconciler: what a lost event should have started, it starts."""

from __future__ import annotations

from prefect import flow
from prefect.deployments import run_deployment

from flows.deploy import deployments
from flows.plan import make_plan
from flows.recipe import load_recipe
from preferences.errors import PairwrightError
from preferences.store import Store


@flow(name="reconcile", validate_parameters=False)
def reconcile(store: str) -> list[str]:
    """Start the alignment of every finished dataset that has none; returns what was started."""
    started = []
    for name, deployment in deployments(Store(store)):
        try:
            plan = make_plan(load_recipe(deployment.recipe, deployment.settings))
        except PairwrightError as error:
            print(f"{name}: {error}")
            continue
        place = Store(deployment.store)
        last = plan.evaluation or plan.alignment
        if last is None or place.manifest(plan.dataset) is None or place.manifest(last):
            continue
        # The same key is the same run, however often this is asked.
        run_deployment(
            f"align/{name}",
            parameters={
                "recipe": deployment.recipe,
                "settings": deployment.settings,
                "store": deployment.store,
                "dataset": place.address(plan.dataset),
            },
            idempotency_key=f"{plan.dataset.fingerprint}-{last.fingerprint}",
            timeout=0,
        )
        started.append(name)
    return started
