"""Write-once artifacts, and who makes which shard."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from preferences.errors import ServiceError
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Dropped
from preferences.sharing import work_through
from preferences.store import Artifact, Manifest, Shard, Store, shards
from tests.preferences.strategies import PROMPT_IDS

ANSWERS = Artifact("candidates", "f00d")


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def answers(count: int) -> list[Candidate]:
    """One answer to each of so many prompts, in the order of the prompts' ids."""
    ids = sorted(fingerprint(n) for n in range(count))
    return [Candidate(f"c{i}", i, "m", f"answer {i}", "complete") for i in ids]


def write(store: Store, rows: list[Candidate], count: int) -> None:
    for index in range(count):
        shard = Shard(index, count)
        store.write_part(ANSWERS, shard, Candidate, (r for r in rows if r.prompt_id in shard))


def files(store: Store) -> list[str]:
    """The names of all files in the artifact's folder."""
    return sorted(path.rsplit("/", 1)[-1] for path in store.fs.find(store.folder(ANSWERS)))


def manifest(rows: int) -> Manifest:
    return Manifest("candidates", "f00d", "answers", rows, 0, ("part-000-of-001.parquet",))


# Shards


@given(PROMPT_IDS, st.integers(1, 100_000), st.integers(1, 500))
def test_every_prompt_is_in_exactly_one_shard(prompt_id: str, prompts: int, size: int) -> None:
    cut = shards(prompts, size)
    (home,) = (shard for shard in cut if prompt_id in shard)
    first, last = home.buckets
    assert first <= int(prompt_id[:2], 16) <= last


@given(st.integers(0, 100_000), st.integers(1, 5000))
def test_shards_are_a_power_of_two_that_keeps_each_small(prompts: int, size: int) -> None:
    count = len(shards(prompts, size))
    assert count in {2**n for n in range(9)}
    assert count == 256 or prompts <= count * size
    assert count == 1 or prompts > count // 2 * size


@pytest.mark.parametrize("count", [1, 2, 4, 256])
def test_the_buckets_of_all_shards_cover_every_leading_byte_once(count: int) -> None:
    covered = [
        value
        for index in range(count)
        for value in range(Shard(index, count).buckets[0], Shard(index, count).buckets[1] + 1)
    ]
    assert covered == list(range(256))


# Parts


@pytest.mark.parametrize("written", [1, 4])
@pytest.mark.parametrize("read", [1, 2, 8])
def test_a_part_reads_the_same_however_the_artifact_was_cut(
    store: Store, written: int, read: int
) -> None:
    rows = answers(40)
    write(store, rows, written)
    found = [r for i in range(read) for r in store.read_part(ANSWERS, Shard(i, read), Candidate)]
    assert found == rows
    assert list(store.read(ANSWERS, Candidate)) == rows
    assert store.count(ANSWERS) == 40


def test_a_part_of_an_interrupted_run_that_was_cut_otherwise_adds_no_rows(store: Store) -> None:
    rows = answers(40)
    half = Shard(0, 2)
    store.write_part(ANSWERS, half, Candidate, (r for r in rows if r.prompt_id in half))
    # The run dies here, and the next one has another shard size.
    write(store, rows, 4)
    assert store.count(ANSWERS) == 40
    assert list(store.read(ANSWERS, Candidate)) == rows


def test_what_is_dropped_lies_beside_what_is_kept(store: Store) -> None:
    (kept,) = answers(1)
    dropped = Dropped("candidates", "x", kept.prompt_id, "duplicate", "t:2")
    assert store.write_part(ANSWERS, Shard(0, 1), Candidate, [dropped, kept, dropped]) == (1, 2)
    assert list(store.read(ANSWERS, Candidate)) == [kept]
    assert list(store.read(ANSWERS, Dropped, kind="dropped")) == [dropped, dropped]
    assert files(store) == ["dropped-000-of-001.parquet", "part-000-of-001.parquet"]


def test_a_part_that_breaks_off_half_way_leaves_nothing(store: Store) -> None:
    def breaks() -> Iterator[Candidate]:
        # More than a row group, so that rows are on the disk when it breaks.
        yield from answers(5) * 1000
        raise RuntimeError("the engine died")

    with pytest.raises(RuntimeError, match="the engine died"):
        store.write_part(ANSWERS, Shard(0, 1), Candidate, breaks())
    assert not store.has_part(ANSWERS, Shard(0, 1))
    assert files(store) == []


def test_the_manifest_says_done_and_comes_back_whole(store: Store) -> None:
    write(store, answers(3), 1)
    assert store.manifest(ANSWERS) is None
    assert store.manifests("candidates") == []
    store.finish(ANSWERS, manifest(3))
    assert store.manifest(ANSWERS) == manifest(3)
    assert store.manifests("candidates") == [manifest(3)]


def test_any_process_can_open_an_artifact_by_its_address(store: Store) -> None:
    write(store, answers(3), 1)
    place = Store(store.address(ANSWERS))
    assert place.fs.exists(place.path("part-000-of-001.parquet"))


def test_a_text_is_replaced_whole(store: Store) -> None:
    path = store.path("deep", "down", "note.txt")
    assert store.read_text(path) is None
    store.write_text(path, "first, and longer")
    store.write_text(path, "seçond")
    assert store.read_text(path) == "seçond"
    assert store.fs.find(store.path("deep")) == [path]


# A full disk


class FullDisk(LocalFileSystem):  # type: ignore[misc]
    """A disk with no space left: every write goes to the device that is always full."""

    cachable = False

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return Path("/dev/full").open(mode, buffering=0) if "w" in mode else super()._open(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.fs = FullDisk()
    with pytest.raises(ServiceError, match=r"no space left on the disk; free some and run"):
        store.write_part(ANSWERS, Shard(0, 1), Candidate, answers(3))
    assert files(Store(tmp_path)) == []


# Claims


def test_a_claim_is_held_by_one_and_free_when_it_is_given_back(store: Store) -> None:
    with store.claim("a/b") as ours:
        assert ours
        with store.claim("a/b") as second, store.claim("a/c") as other:
            assert not second
            assert other
    with store.claim("a/b") as again:
        assert again


def test_two_threads_on_one_store_make_every_shard_once(store: Store) -> None:
    made: list[int] = []
    owed = [Shard(index, 8) for index in range(8)]
    rows = answers(40)

    def make(shard: Shard) -> None:
        time.sleep(0.02)
        store.write_part(ANSWERS, shard, Candidate, (r for r in rows if r.prompt_id in shard))
        made.append(shard.index)

    both = [
        threading.Thread(target=work_through, args=(store, ANSWERS, order, make))
        for order in (owed, owed[::-1])
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(made) == list(range(8))
    assert list(store.read(ANSWERS, Candidate)) == rows


_WORKER = """
import sys, time
from preferences.records import Candidate
from preferences.sharing import work_through
from preferences.store import Artifact, Shard, Store
store, artifact = Store(sys.argv[1]), Artifact("candidates", "f00d")

def make(shard):
    print(shard.index, flush=True)
    if sys.argv[2] == "hang" and shard.index == 0:
        time.sleep(100)
    time.sleep(0.05)
    store.write_part(artifact, shard, Candidate, [])

sys.stdin.readline()
work_through(store, artifact, [Shard(index, 8) for index in range(8)], make)
"""


def worker(store: Path, manner: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WORKER, str(store), manner]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )


@pytest.mark.timeout(60)
def test_two_processes_make_every_shard_once_and_a_killed_ones_claim_is_free(
    tmp_path: Path,
) -> None:
    hangs, works = worker(tmp_path, "hang"), worker(tmp_path, "work")
    assert hangs.stdin is not None
    assert hangs.stdout is not None
    hangs.stdin.write("\n")
    hangs.stdin.flush()
    assert hangs.stdout.readline() == "0\n"
    store = Store(tmp_path)
    with store.claim("candidates/f00d/000-of-008") as ours:
        assert not ours
    # The other is left with the seven that nobody holds, and waits for the eighth.
    assert works.stdin is not None
    assert works.stdout is not None
    works.stdin.write("\n")
    works.stdin.flush()
    assert [works.stdout.readline() for _ in range(7)] == [f"{n}\n" for n in range(1, 8)]
    assert works.poll() is None
    hangs.send_signal(signal.SIGKILL)
    hangs.communicate()
    rest, _ = works.communicate(timeout=30)
    assert rest == "0\n"
    assert works.returncode == 0
    assert all(store.has_part(ANSWERS, Shard(index, 8)) for index in range(8))


def test_what_a_killed_process_left_half_written_is_swept_away(store: Store) -> None:
    half = [f"{store.folder(ANSWERS)}/part-00{n}-of-002.parquet.0a1b.tmp" for n in range(2)]
    for path in half:
        store.fs.makedirs(store.folder(ANSWERS), exist_ok=True)
        store.fs.pipe_file(path, b"PAR1")
    rows = answers(20)
    first, second = Shard(0, 2), Shard(1, 2)

    def make(shard: Shard) -> None:
        store.write_part(ANSWERS, shard, Candidate, (r for r in rows if r.prompt_id in shard))

    # The other shard's may still be written: its claim is not ours.
    work_through(store, ANSWERS, [first], make)
    assert [store.fs.exists(path) for path in half] == [False, True]
    work_through(store, ANSWERS, [second], make)
    assert not any(store.fs.exists(path) for path in half)
    assert list(store.read(ANSWERS, Candidate)) == rows


def test_a_lease_that_nobody_renews_falls_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preferences.store.LEASE_SECONDS", 0.2)
    store = Store(f"memory://{uuid.uuid4().hex}")
    lease = store.path("claims", "a-b.lease")
    store.fs.makedirs(store.path("claims"), exist_ok=True)
    store.fs.pipe_file(lease, b'{"owner": "dead", "renewed": 0}')
    with store.claim("a/b") as ours:
        assert ours
        # Three leases long: it is renewed, so it stays ours.
        time.sleep(0.6)
        with store.claim("a/b") as second:
            assert not second
    assert not store.fs.exists(lease)


def test_a_shard_whose_engine_fails_stays_owed_and_the_others_are_kept(store: Store) -> None:
    owed = [Shard(index, 4) for index in range(4)]

    def make(shard: Shard) -> None:
        if shard.index in (0, 2):
            raise ServiceError(f"endpoint down at {shard.index}")
        store.write_part(ANSWERS, shard, Candidate, [])

    with pytest.raises(ServiceError, match=r"2 of 4 shards failed \(endpoint down at 0\)"):
        work_through(store, ANSWERS, owed, make)
    assert [store.has_part(ANSWERS, shard) for shard in owed] == [False, True, False, True]
    # The claims are free again: a second go makes what is owed, and only that.
    again: list[int] = []
    work_through(store, ANSWERS, owed, lambda shard: again.append(shard.index))
    assert again == [0, 2]
