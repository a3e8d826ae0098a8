"""Stages that only compute are shared out among this machine's cores."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from flows import cores
from flows.build import _make_all
from flows.cores import WORTH, work_together
from flows.run import Make, Run
from preferences.errors import ServiceError
from preferences.records import Dropped
from preferences.store import Artifact, Shard, shards
from tests.flows.asking import Models, parts, prepared, serving, write_recipe

ARTIFACT = Artifact("preferences", "shared")
OWED = shards(2 * WORTH, 1)


def slowly(run: Run) -> Make:
    """Each shard says which process made it, and takes longer than a helper takes to start."""

    def make(shard: Shard) -> None:
        time.sleep(0.2)
        mine = Dropped("stage", str(os.getpid()), f"{shard.buckets[0]:02x}", "made")
        run.store.write_part(ARTIFACT, shard, Dropped, [mine])

    return make


def only_here(run: Run) -> Make:
    """Fails in a helper."""

    def make(shard: Shard) -> None:
        time.sleep(0.1)
        if multiprocessing.parent_process() is not None:
            raise ServiceError("a helper's own trouble")
        run.store.write_part(ARTIFACT, shard, Dropped, [])

    return make


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    made = prepared(write_recipe(tmp_path, "http://127.0.0.1:1"), tmp_path / "store")
    made.shards = OWED
    return made


def test_two_cores_share_the_shards_and_each_is_made_once(run: Run) -> None:
    work_together(run, ARTIFACT, "preferences", OWED, slowly)
    made = list(run.store.read(ARTIFACT, Dropped))
    assert [row.prompt_id for row in made] == [f"{shard.buckets[0]:02x}" for shard in OWED]
    makers = {row.record_id for row in made}
    assert len(makers) == 2
    assert str(os.getpid()) in makers


def test_what_goes_wrong_in_a_helper_is_made_here(run: Run) -> None:
    work_together(run, ARTIFACT, "preferences", OWED, only_here)
    assert all(run.store.has_part(ARTIFACT, shard) for shard in OWED)


def test_few_shards_are_made_here_alone(run: Run) -> None:
    few = OWED[:-1]
    work_together(run, ARTIFACT, "preferences", few, only_where_no_helper_is)
    assert all(run.store.has_part(ARTIFACT, shard) for shard in few)


def only_where_no_helper_is(run: Run) -> Make:
    assert not multiprocessing.active_children()
    return only_here(run)


@pytest.mark.slow
def test_a_dataset_made_by_two_processes_is_the_one_made_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for count in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        monkeypatch.setattr(cores, "WORTH", 4)
        folder = tmp_path / f"{count}"
        folder.mkdir()
        with serving(Models()) as endpoint:
            recipe = write_recipe(folder, endpoint.url, prompts=160, shard_size=5)
            run = prepared(recipe, folder / "store")
            _make_all(run, "")
        made.append(parts(folder / "store"))
    assert made[0].keys() == made[1].keys()
    assert all(made[0][name].equals(made[1][name]) for name in made[0])
