"""Asking people's tool every so often whether they are done: people take days, a flow does not."""

from __future__ import annotations

from prefect import flow

from flows import labels
from flows.deploy import current_recipe, deployments
from flows.events import labels_finished
from flows.recipe import load_recipe
from preferences.errors import PairwrightError
from preferences.store import Store


@flow(name="poll-labels", validate_parameters=False)
def poll_labels(store: str) -> list[str]:
    """Take up what people have answered; tell of every recipe whose labels are finished.

    Returns their names. It is told again, every time, until the dataset is there.
    """
    finished = []
    for name, deployment in deployments(Store(store)):
        try:
            if is_due(*current_recipe(deployment), Store(deployment.store)):
                labels_finished(name)
                finished.append(name)
        except PairwrightError as error:
            print(f"{name}: {error}")
    return finished


def is_due(recipe: str, settings: dict[str, str], place: Store) -> bool:
    """Whether people's answers, or the end of the wait for them, ask for a new dataset."""
    loaded = load_recipe(recipe, settings, dataset_only=True)
    asked = None if loaded.people is None else labels.asked_before(loaded, place)
    if asked is None:
        return False
    labels.take_up(loaded, place, print)
    plan = labels.plan_with_answers(loaded, place)
    over = labels.is_over(loaded, asked) and not asked.ended
    done = over or not asked.missing(plan.given)
    return done and place.manifest(plan.dataset) is None
