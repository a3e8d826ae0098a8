"""The events by which one flow starts another."""

from __future__ import annotations

from collections.abc import Mapping

from prefect.events import DeploymentEventTrigger, emit_event

from preferences.store import Manifest

DATASET_FINISHED = "preference-dataset.finished"
LABELS_FINISHED = "labels.finished"


def dataset_finished(
    dataset: Manifest, address: str, recipe: str, settings: Mapping[str, str]
) -> None:
    """Tell that a dataset is finished, and where it is."""
    emit_event(
        event=DATASET_FINISHED,
        resource={
            "prefect.resource.id": f"preference-dataset.{dataset.name}.{dataset.fingerprint}",
            "prefect.resource.name": dataset.name,
        },
        payload={
            "dataset_id": dataset.fingerprint,
            "uri": address,
            "rows": dataset.rows,
            "recipe": recipe,
            "settings": dict(settings),
        },
    )


def labels_finished(name: str) -> None:
    """Tell that people have answered what a deployed recipe asked, or that the wait is over."""
    resource = {"prefect.resource.id": f"labels.{name}", "prefect.resource.name": name}
    emit_event(event=LABELS_FINISHED, resource=resource)


def on_finished_labels(name: str) -> DeploymentEventTrigger:
    """Start a deployment when the labels of this name are finished."""
    return DeploymentEventTrigger(
        name=f"build {name} when its labels are finished",
        enabled=True,
        expect={LABELS_FINISHED},
        match={"prefect.resource.id": f"labels.{name}"},
        threshold=1,
        within=0,
    )


def on_finished_dataset(name: str) -> DeploymentEventTrigger:
    """Start a deployment with the address of each dataset of this name that is finished."""
    return DeploymentEventTrigger(
        name=f"align {name} when its dataset is finished",
        enabled=True,
        expect={DATASET_FINISHED},
        match={"prefect.resource.id": f"preference-dataset.{name}.*"},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=0,
        # A plain jinja parameter is always a string, which is what an address is.
        parameters={"dataset": {"__prefect_kind": "jinja", "template": "{{ event.payload.uri }}"}},
    )
