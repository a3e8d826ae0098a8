"""Training from and into a bucket: it lands there whole, and a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows.progress import Progress
from flows.recipe import Recipe
from flows.train import train_model
from preferences.errors import ServiceError
from preferences.store import Artifact, Manifest, Store
from training.dpo import DPOConfig

DATASET, MODEL = Artifact("dataset", "da7a"), Artifact("alignment", "0de1")


@pytest.fixture
def here(without_children: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Training in this process, its working folders under the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe(config: DPOConfig, **training: int) -> Recipe:
    values = {
        "name": "red",
        "candidates": [{"kind": "import", "name": "answers", "source": "answers.jsonl"}],
        "judges": [{"kind": "prior", "name": "order", "order": ["strong", "weak"]}],
        "alignment": config.model_dump(mode="json"),
        "runtime": {"training": training},
    }
    return Recipe.model_validate(values)


def with_dataset(store: Store, pairs: Path) -> Store:
    """The store, with the pairs as a finished dataset."""
    for file in (pairs / "data").glob("*.parquet"):
        path = f"{store.folder(DATASET)}/data/{file.name}"
        store.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        store.fs.pipe_file(path, file.read_bytes())
    store.finish(DATASET, Manifest("dataset", "da7a", "red", 72, 0, ()))
    return store


def contents(store: Store) -> dict[str, bytes]:
    """The files of the model in the store."""
    folder = store.folder(MODEL)
    return {str(p).removeprefix(folder): store.fs.cat_file(p) for p in store.fs.find(folder)}


@pytest.fixture
def short(make_config: Callable[..., DPOConfig]) -> DPOConfig:
    return make_config(max_steps=16, probe=None)


def test_a_model_trained_into_a_bucket_is_the_one_trained_into_a_folder(
    here: None, short: DPOConfig, red_pairs: Path, tmp_path: Path
) -> None:
    folder = with_dataset(Store(tmp_path / "store"), red_pairs)
    bucket = with_dataset(Store(f"memory://{uuid.uuid4().hex}"), red_pairs)
    for store in (folder, bucket):
        train_model(recipe(short, log_steps=4, save_steps=8), store, DATASET, MODEL, Progress())
        manifest = store.manifest(MODEL)
        assert manifest is not None
        assert manifest.parts == ("adapter",)
        assert manifest.summary["steps"] == 16
        assert manifest.summary["held_out"]["pairs"] == 24
    ours, theirs = contents(bucket), contents(folder)
    weights = "/adapter/adapter_model.safetensors"
    assert ours[weights] == theirs[weights]
    assert ours["/metrics.jsonl"] == theirs["/metrics.jsonl"]
    # Nothing that only an unfinished run needs, and nothing left on this machine.
    assert {name for name in ours if "checkpoint" in name or name.endswith(".lock")} == set()
    assert ours.keys() - {"/manifest.json"} == theirs.keys() - {"/manifest.json", "/.lock"}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not bucket.fs.glob(bucket.path("claims", "*"))


def test_the_manifest_is_the_last_thing_to_reach_the_bucket(
    here: None,
    short: DPOConfig,
    red_pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = with_dataset(Store(f"memory://{uuid.uuid4().hex}"), red_pairs)
    put = type(store.fs).put_file
    sent: list[str] = []

    def breaks(self: Any, local: str, remote: str, **options: Any) -> None:
        if len(sent) == 3:
            raise ServiceError("the connection broke")
        sent.append(remote)
        put(self, local, remote, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(store.fs), "put_file", breaks)
        with pytest.raises(ServiceError, match="the connection broke"):
            train_model(recipe(short), store, DATASET, MODEL, Progress())
    assert len(sent) == 3
    assert store.manifest(MODEL) is None
    # The trained weights are still here: sending them again trains nothing.
    monkeypatch.setattr("training.hooks.run_trainer", _never)
    train_model(recipe(short), store, DATASET, MODEL, Progress())
    assert store.manifest(MODEL) is not None
    assert "/adapter/adapter_model.safetensors" in contents(store)
    assert "/result.json" in contents(store)


def _never(*_: Any) -> None:
    raise AssertionError("it was trained again")


def test_an_interrupted_run_into_a_bucket_goes_on_from_its_checkpoint(
    here: None,
    short: DPOConfig,
    red_pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from training.hooks import Recorder

    whole = with_dataset(Store(tmp_path / "whole"), red_pairs)
    store = with_dataset(Store(f"memory://{uuid.uuid4().hex}"), red_pairs)
    settings = recipe(short, log_steps=4, save_steps=4)
    train_model(settings, whole, DATASET, MODEL, Progress())
    steps: list[int] = []
    end = Recorder.on_step_end

    def dies(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        end(self, args, state, control, **kwargs)

    monkeypatch.setattr(Recorder, "on_step_end", dies)
    with pytest.raises(KeyboardInterrupt):
        train_model(settings, store, DATASET, MODEL, Progress())
    assert store.manifest(MODEL) is None
    train_model(settings, store, DATASET, MODEL, Progress())
    # It died in step 10, the checkpoint is of step 8.
    assert steps == [*range(1, 11), *range(9, 17)]
    weights = "/adapter/adapter_model.safetensors"
    assert contents(store)[weights] == contents(whole)[weights]


def test_a_model_that_another_process_trains_is_waited_for(
    short: DPOConfig, red_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = with_dataset(Store(f"memory://{uuid.uuid4().hex}"), red_pairs)
    monkeypatch.setattr("flows.train.WAIT_SECONDS", 0.02)
    monkeypatch.setattr("flows.train._train_claimed", _never)
    with ThreadPoolExecutor(1) as pool:
        with store.claim(str(MODEL)) as ours:
            assert ours
            waits = pool.submit(train_model, recipe(short), store, DATASET, MODEL, Progress())
            time.sleep(0.2)
            assert not waits.done()
            store.finish(MODEL, Manifest("alignment", "0de1", "red", 72, 0, ("adapter",)))
        waits.result(timeout=10)


_TRAINER = """
import sys
import tests.preferences.bucket
from flows.progress import Progress
from flows.recipe import Recipe
from flows.train import train_model
from preferences.store import Store
from tests.training.test_bucket import DATASET, MODEL

if __name__ == "__main__":
    recipe = Recipe.model_validate_json(open(sys.argv[1]).read())
    train_model(recipe, Store("bucket://b"), DATASET, MODEL, Progress())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_a_run_that_another_one_finishes(
    how: signal.Signals,
    make_config: Callable[..., DPOConfig],
    red_pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tests.preferences.bucket  # noqa: F401

    monkeypatch.setenv("BUCKET", str(tmp_path / "bucket"))
    (tmp_path / "bucket").mkdir()
    store = with_dataset(Store("bucket://b"), red_pairs)
    long = recipe(make_config(max_steps=400, probe=None, eval_steps=400), log_steps=4, save_steps=8)
    (tmp_path / "recipe.json").write_text(long.model_dump_json())
    (tmp_path / "trainer.py").write_text(_TRAINER)
    command = [sys.executable, str(tmp_path / "trainer.py"), str(tmp_path / "recipe.json")]
    environment = os.environ | {
        "PYTHONPATH": str(Path.cwd()),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }

    def marks() -> list[Path]:
        return list((tmp_path / "cache").rglob("checkpoint-*/complete.json"))

    first = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while not marks() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    # The parent alone is told, as by an out-of-memory killer or by a supervisor.
    first.send_signal(how)
    first.wait(timeout=20)
    assert marks()
    assert store.manifest(MODEL) is None
    time.sleep(3)
    # Nobody trains on behind the back of the dead: no step is added.
    (metrics,) = (tmp_path / "cache").rglob("metrics.jsonl")
    reached = metrics.read_text()
    time.sleep(1)
    assert metrics.read_text() == reached

    for lease in (tmp_path / "bucket" / "b" / "claims").iterdir():
        held = json.loads(lease.read_text())
        lease.write_text(json.dumps({**held, "renewed": 0}))  # a minute later
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr
    manifest = store.manifest(MODEL)
    assert manifest is not None
    assert manifest.summary["steps"] == 400
    said = [line for line in second.stderr.splitlines() if line.startswith("step ")]
    assert int(said[0].split()[1].split("/")[0]) > 8
