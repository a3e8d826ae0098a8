"""Rounds on a schedule: they are served in place of build and alignment, and go on where people or
a lost process left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.deploy import current_recipe, deployments, record_deployment, served
from flows.labels import plan_with_answers
from flows.recipe import load_recipe
from flows.reconcile import reconcile
from flows.rounds import RoundsConfig, go_round
from preferences.errors import InputError
from preferences.store import Manifest, Store
from tests.flows.test_recipe import recipe
from tests.flows.test_rounds import BLIND, CHECK, OTHERS, POLICY, SAMPLED, Carried

GOING_ROUND: dict[str, Any] = {
    "candidates": [SAMPLED, *OTHERS],
    "judges": [CHECK],
    "alignment": {"model": POLICY, **BLIND},
    "evaluation": {},
}


def deployed(folder: Path, cron: str | None = None, **changes: Any) -> Store:
    place = Store(folder / "store")
    record_deployment(recipe(folder, **GOING_ROUND, **changes), cron, {}, place.url)
    return place


@pytest.mark.parametrize(
    ("rounds", "flows"),
    [(None, ["build", "align"]), ({"most": 2}, ["iterate"])],
)
def test_a_recipe_with_rounds_is_served_as_rounds(
    rounds: dict[str, int] | None, flows: list[str], tmp_path: Path
) -> None:
    place = deployed(tmp_path, "0 3 * * *", rounds=rounds)
    found = served(deployments(place), place.url)
    names = [f"{one.flow_name}/{one.name}" for one in found]
    assert names == [*(f"{flow}/small" for flow in flows), "reconcile/all", "poll-labels/all"]
    (schedule,) = found[0].schedules
    assert schedule.schedule.cron == "0 3 * * *"


def test_a_recipe_that_cannot_go_round_is_not_deployed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no candidates are sampled from"):
        record_deployment(
            recipe(tmp_path, **{**GOING_ROUND, "candidates": OTHERS}, rounds={"most": 2}),
            None,
            {},
            str(tmp_path / "store"),
        )


def test_people_are_waited_for_in_the_round_that_is_not_finished(tmp_path: Path) -> None:
    place = deployed(tmp_path, rounds={"most": 2})
    ((_, deployment),) = deployments(place)
    loaded = load_recipe(deployment.recipe)
    for done in range(2):
        assert Path(current_recipe(deployment)[0]).name == f"round-{done + 1}.yaml"
        go_round(loaded, place, RoundsConfig(most=done + 1), Carried(place, [0.7]))
    assert current_recipe(deployment)[0] == deployment.recipe


def test_rounds_whose_process_is_gone_are_started_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "flows.reconcile.run_deployment", lambda name, **given: started.append((name, given))
    )
    place = deployed(tmp_path, rounds={"most": 2})
    ((_, deployment),) = deployments(place)
    assert reconcile.fn(place.url) == []  # There is no dataset yet.
    plan = plan_with_answers(load_recipe(current_recipe(deployment)[0]), place)
    place.finish(plan.dataset, Manifest("dataset", plan.dataset.fingerprint, "n", 7, 0, ()))
    assert reconcile.fn(place.url) == reconcile.fn(place.url) == ["small"]
    assert [name for name, _ in started] == ["iterate/small"] * 2
    assert started[0][1]["parameters"]["recipe"] == deployment.recipe
    # Prefect takes two runs with one key for the same.
    assert started[0][1]["idempotency_key"] == started[1][1]["idempotency_key"]
