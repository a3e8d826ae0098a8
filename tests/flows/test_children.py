"""Work in several processes: each knows its place, and none outlives the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flows
from flows.children import in_children
from preferences.errors import InputError, ServiceError

ROOT = Path(flows.__file__).parents[1]


def place() -> tuple[str, ...]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(os.environ[name] for name in names)


def one_is_refused(folder: Path) -> None:
    """The second process; the first waits for it."""
    rank = register(folder)
    if rank == 1:
        raise InputError("batch_size: too large")
    time.sleep(600)


def one_is_killed(folder: Path) -> None:
    """The second process; the first then loses it, as one does that talks to another."""
    rank = register(folder)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while (folder / "1").exists() and is_alive(int((folder / "1").read_text())):
        time.sleep(0.01)
    raise RuntimeError("Connection closed by peer")


def wait_for_ever(folder: Path) -> None:
    register(folder)
    time.sleep(600)


def register(folder: Path) -> int:
    """Write this process's id, and wait for the other's."""
    rank = int(os.environ["RANK"])
    part = folder / f"{rank}.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / str(rank))
    while not (folder / str(1 - rank)).exists():
        time.sleep(0.01)
    return rank


def is_alive(pid: int) -> bool:
    """And not only waited for by its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def assert_ended(folder: Path) -> None:
    pids = [int((folder / name).read_text()) for name in ("0", "1")]
    deadline = time.monotonic() + 120
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "a process goes on without the others"
        time.sleep(0.1)


def test_the_first_process_answers_and_knows_that_it_is_one_of_two() -> None:
    assert in_children("asking", 2, place) == ("0", "0", "2", "2", "127.0.0.1")


def test_what_is_wrong_in_one_process_ends_all_and_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size: too large"):
        in_children("training", 2, one_is_refused, tmp_path)
    assert_ended(tmp_path)


def test_a_process_that_is_killed_is_the_cause_and_not_what_the_other_says(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="training was killed"):
        in_children("training", 2, one_is_killed, tmp_path)
    assert_ended(tmp_path)


def test_both_end_when_the_process_is_killed_that_wants_their_work(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from flows.children import in_children\n"
        "from tests.flows.test_children import wait_for_ever\n"
        "if __name__ == '__main__':\n"
        "    in_children('training', 2, wait_for_ever, Path(sys.argv[1]))\n"
    )
    (tmp_path / "parent.py").write_text(script)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 120
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert_ended(tmp_path)
