"""Training on a disk that fills up: one line, and with space again the same weights."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.progress import Progress
from flows.train import train_model
from preferences.store import DiskFull, Store
from tests.training.test_bucket import DATASET, MODEL, contents, recipe, with_dataset
from training.dpo import DPOConfig

MakeConfig = Callable[..., DPOConfig]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # As safetensors 0.7 and torch 2.13 say it, seen on a tmpfs that was full.
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
    ids=["files", "safetensors", "torch"],
)
def test_a_checkpoint_that_fills_the_disk_is_one_line_with_the_cure(
    make_config: MakeConfig,
    red_pairs: Path,
    tmp_path: Path,
    without_children: None,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr("training.hooks.run_trainer", full)
    store = with_dataset(Store(tmp_path), red_pairs)
    with pytest.raises(DiskFull, match=r"no space left on the disk; free some and run the same"):
        train_model(recipe(make_config(probe=None)), store, DATASET, MODEL, Progress())
    assert store.manifest(MODEL) is None


_TRAINER = """
import sys
from flows.progress import Progress
from flows.recipe import Recipe
from flows.train import train_model
from preferences.errors import PairwrightError
from preferences.store import Store
from tests.training.test_bucket import DATASET, MODEL

if __name__ == "__main__":
    recipe = Recipe.model_validate_json(open(sys.argv[1]).read())
    try:
        train_model(recipe, Store(sys.argv[2]), DATASET, MODEL, Progress())
    except PairwrightError as error:
        print(error)
        sys.exit(error.exit_code)
"""

_IN_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=$1k none disk
cp -r small/* disk
set +e
"$PYTHON" trainer.py recipe.json disk >first.out 2>first.err
echo $? >first.code
set -e
mount -o remount,size=64m disk
"$PYTHON" trainer.py recipe.json disk
cp -r disk/* small
"""


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="this system gives no namespaces",
)
# So that the first checkpoint does not fit, or the third.
@pytest.mark.parametrize("kibibytes", [100, 800])
def test_on_a_real_disk_that_is_full_training_stops_and_then_ends_with_the_same_weights(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path, kibibytes: int
) -> None:
    config = recipe(make_config(max_steps=16, probe=None), log_steps=4, save_steps=4)
    stores = [with_dataset(Store(tmp_path / name), red_pairs) for name in ("small", "large")]
    (tmp_path / "disk").mkdir()
    (tmp_path / "recipe.json").write_text(config.model_dump_json())
    (tmp_path / "trainer.py").write_text(_TRAINER)
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(Path.cwd()),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        ["unshare", "-rm", "sh", "-c", _IN_A_SMALL_DISK, "sh", str(kibibytes)],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    subprocess.run(
        [sys.executable, "trainer.py", "recipe.json", "large"],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert (tmp_path / "first.code").read_text() == "1\n", (tmp_path / "first.err").read_text()
    (line,) = (tmp_path / "first.out").read_text().splitlines()
    assert "no space left on the disk" in line
    assert "Traceback" not in (tmp_path / "first.err").read_text()
    mended, whole = map(contents, stores)
    weights = "/adapter/adapter_model.safetensors"
    assert mended[weights] == whole[weights]
    assert mended["/metrics.jsonl"] == whole["/metrics.jsonl"]
