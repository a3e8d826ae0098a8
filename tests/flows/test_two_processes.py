"""Two processes that run one recipe on one store share it out and end with the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.asking import Models, carry_out, parts, serving, write_recipe
from tests.generation.endpoint import Answer

HERE = (
    "import sys, tests.preferences.bucket; from pathlib import Path; "
    "from tests.flows.asking import carry_out; print('ready', flush=True); sys.stdin.readline(); "
    "carry_out(Path(sys.argv[1]), sys.argv[2])"
)
COMMAND = (
    "import sys; print('ready', flush=True); sys.stdin.readline(); "
    "sys.argv[1:] = ['run', sys.argv[1], '--store', sys.argv[2], '--no-report']; "
    "from flows.cli import main; main()"
)


class Slow(Models):
    """Takes a while over each call, so that both processes are at work."""

    def __call__(self, body: dict[str, Any], number: int) -> Answer:
        time.sleep(0.01)
        return super().__call__(body, number)


def both(program: str, recipe: Path, store: str, **environment: str) -> Iterator[tuple[int, str]]:
    """Start two processes at the same moment; yields how each ended and what it said."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(recipe), store],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, error = process.communicate(timeout=240)
        yield process.returncode, error


@pytest.mark.parametrize("kind", ["folder", pytest.param("bucket", marks=pytest.mark.slow)])
def test_two_processes_ask_for_nothing_twice_and_end_with_the_same(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "shared").mkdir()
    root = tmp_path / "shared" / "b"
    store = str(root) if kind == "folder" else "bucket://b"
    models, alone = Slow(), Models()
    with serving(models) as endpoint, serving(alone) as other:
        recipe = write_recipe(
            tmp_path, endpoint.url, prompts=80, shard_size=5, engine={"retries": 3}
        )
        ends = list(both(HERE, recipe, store, BUCKET=str(tmp_path / "shared")))
        assert [code for code, _ in ends] == [0, 0], ends
        # 80 prompts x 2 answers, and of each prompt's one pair both orders.
        assert models.by_model == {"policy": 160, "judge": 160}
        assert models.asked_twice == 0
        again = write_recipe(tmp_path, other.url, prompts=80, shard_size=5)
        carry_out(again, tmp_path / "alone")
    shared, single = parts(root), parts(tmp_path / "alone")
    assert shared.keys() == single.keys()
    assert all(shared[name].equals(single[name]) for name in shared)
    assert not list(root.rglob("*.tmp"))


@pytest.mark.slow
def test_two_commands_at_once_both_succeed(tmp_path: Path) -> None:
    models = Slow()
    with serving(models) as endpoint:
        recipe = write_recipe(
            tmp_path, endpoint.url, prompts=80, shard_size=20, engine={"retries": 3}
        )
        ends = list(both(COMMAND, recipe, str(tmp_path / "store")))
        assert [code for code, _ in ends] == [0, 0], ends
        assert models.by_model == {"policy": 160, "judge": 160}
        assert models.asked_twice == 0
    for _, said in ends:
        assert "Traceback" not in said
