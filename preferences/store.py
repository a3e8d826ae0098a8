"""Write-once artifacts in a folder or a bucket.

    artifacts/<stage>/<fingerprint>/part-003-of-008.parquet     a shard's rows
                                    dropped-003-of-008.parquet  what it dropped, with reasons
                                    manifest.json               written last: it means done

A part is written beside its place and moved there whole, so a part that exists is complete. A shard
belongs to the process that holds its claim; two processes on one store share the shards out and
neither does one twice. Fingerprints name what was asked for, so a finished artifact is never
written again, whoever asks.
"""

from __future__ import annotations

import errno
import json
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from preferences.errors import ServiceError
from preferences.records import (
    SCHEMA_VERSION,
    Dropped,
    RecordT,
    from_table,
    schema_of,
    to_table,
)

ROW_GROUP = 4096
"""Rows written at once: what bounds the memory of a part of any length."""
LEASE_SECONDS = 60.0
"""On a bucket, a claim not renewed for this long belonged to a process that died."""


@dataclass(frozen=True)
class Manifest:
    """What a finished artifact is: enough to find, trust and trace it."""

    stage: str
    fingerprint: str
    name: str
    rows: int
    dropped: int
    parts: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    """The artifacts it was made from, as `stage/fingerprint`."""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Artifact:
    """The address of a stage's output inside a store."""

    stage: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.fingerprint}"


@dataclass(frozen=True)
class Shard:
    """A part of the prompts: those whose id falls in the `index`-th of `count` equal ranges."""

    index: int
    count: int
    """A power of two, at most 256."""

    def __contains__(self, prompt_id: object) -> bool:
        return int(str(prompt_id)[:2], 16) * self.count // 256 == self.index

    @property
    def suffix(self) -> str:
        """What tells this shard's files from another's."""
        return f"{self.index:03d}-of-{self.count:03d}"

    @property
    def buckets(self) -> tuple[int, int]:
        """The first and the last value of the prompt id's leading byte."""
        width = 256 // self.count
        return self.index * width, (self.index + 1) * width - 1


def shards(prompts: int, shard_size: int) -> list[Shard]:
    """As many shards as keep each near `shard_size` prompts.

    Ids are hashes and parts are sorted by id, so the parts of any number of shards, one after
    another, hold the same rows in the same order.
    """
    count = 1
    while count < 256 and prompts > count * shard_size:
        count *= 2
    return [Shard(index, count) for index in range(count)]


class Store:
    """A folder or bucket of artifacts, named by any URL that fsspec knows."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        # A remembered listing would hide what another process has made meanwhile.
        self.fs, self.root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)

    @cached_property
    def is_local(self) -> bool:
        """Whether the store is a folder of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, *parts: str) -> str:
        """A path inside the store, for its file system."""
        return "/".join([self.root.rstrip("/"), *parts])

    def folder(self, artifact: Artifact) -> str:
        """The folder of an artifact, for the store's file system."""
        return self.path("artifacts", artifact.stage, artifact.fingerprint)

    def address(self, artifact: Artifact) -> str:
        """The URL of an artifact, which any process can open."""
        return str(self.fs.unstrip_protocol(self.folder(artifact)))

    # Manifests

    def manifest(self, artifact: Artifact) -> Manifest | None:
        """The artifact's manifest, or None while it is unfinished."""
        text = self.read_text(f"{self.folder(artifact)}/manifest.json")
        if text is None:
            return None
        values = json.loads(text)
        values["parts"], values["inputs"] = tuple(values["parts"]), tuple(values["inputs"])
        return Manifest(**values)

    def finish(self, artifact: Artifact, manifest: Manifest) -> None:
        """Declare an artifact complete. Nothing in it changes after this."""
        cuts = {_cut(part) for part in manifest.parts if "-of-" in part}
        for path in self.fs.glob(f"{self.folder(artifact)}/**/*-of-*.parquet") if cuts else ():
            if _cut(path) not in cuts:
                self.fs.rm_file(path)  # Left by an interrupted run with other shards.
        self.write_text(
            f"{self.folder(artifact)}/manifest.json",
            json.dumps(asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False) + "\n",
        )

    def manifests(self, stage: str) -> list[Manifest]:
        """The finished artifacts of a stage."""
        found = self.fs.glob(self.path("artifacts", stage, "*", "manifest.json"))
        artifacts = [Artifact(stage, str(path).split("/")[-2]) for path in sorted(found)]
        return [m for a in artifacts if (m := self.manifest(a)) is not None]

    # Parts

    def write_part(
        self,
        artifact: Artifact,
        shard: Shard,
        record: type[RecordT],
        rows: Iterable[RecordT | Dropped],
    ) -> tuple[int, int]:
        """Write a shard's rows and, beside them, what it dropped. Returns how many of each."""
        dropped: list[Dropped] = []

        def kept() -> Iterator[RecordT]:
            for row in rows:
                if isinstance(row, record):
                    yield row
                elif isinstance(row, Dropped):
                    dropped.append(row)

        folder = self.folder(artifact)
        with self.staged(f"{folder}/part-{shard.suffix}.parquet") as temporary:
            count = self.write_rows(temporary, record, kept())
            # The drops go first: the part's existence says that both are there.
            with self.staged(f"{folder}/dropped-{shard.suffix}.parquet") as beside:
                self.write_rows(beside, Dropped, iter(dropped))
        return count, len(dropped)

    def has_part(self, artifact: Artifact, shard: Shard, kind: str = "part") -> bool:
        """Whether this shard of the artifact is written."""
        return bool(self.fs.exists(f"{self.folder(artifact)}/{kind}-{shard.suffix}.parquet"))

    def read_part(self, artifact: Artifact, shard: Shard, record: type[RecordT]) -> list[RecordT]:
        """A shard's rows, however the artifact was cut into shards when it was written."""
        return from_table(record, self.part_table(artifact, shard, record))

    def part_table(self, artifact: Artifact, shard: Shard, record: type[RecordT]) -> pa.Table:
        """The same as an Arrow table."""
        path = f"{self.folder(artifact)}/part-{shard.suffix}.parquet"
        if self.fs.exists(path):
            return self._read(path)
        return to_table(record, (r for r in self.read(artifact, record) if r.prompt_id in shard))

    def read(
        self, artifact: Artifact, record: type[RecordT], kind: str = "part"
    ) -> Iterator[RecordT]:
        """All rows of an artifact, a row group at a time; `kind="dropped"` reads the drops."""
        for table in self.tables(artifact, kind):
            yield from from_table(record, table)

    def tables(self, artifact: Artifact, kind: str = "part") -> Iterator[pa.Table]:
        """The same as Arrow tables, one for each row group."""
        for path in self._files(artifact, kind):
            with self.fs.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group)

    def count(self, artifact: Artifact, kind: str = "part") -> int:
        """How many rows the artifact's parts hold."""
        total = 0
        for path in self._files(artifact, kind):
            with self.fs.open(path, "rb") as stream:
                total += pq.read_metadata(stream).num_rows
        return total

    def _files(self, artifact: Artifact, kind: str) -> list[str]:
        """The files of one cut: an interrupted run with other shards can have left some of its."""
        cuts: dict[str, list[str]] = {}
        for path in sorted(self.fs.glob(f"{self.folder(artifact)}/{kind}-*-of-*.parquet")):
            cuts.setdefault(_cut(path), []).append(path)
        whole = [paths for count, paths in cuts.items() if len(paths) == int(count)]
        return whole[0] if whole else [path for paths in cuts.values() for path in paths]

    # Claims

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Try to become the one process that works on `key`; yields whether it is ours.

        The claim of a process that died is free again: at once in a folder, where the kernel
        holds it, and after a minute in a bucket, where it is a lease.
        """
        with (self._file_claim if self.is_local else self._lease)(key) as ours:
            yield ours

    @contextmanager
    def _file_claim(self, key: str) -> Iterator[bool]:
        path = Path(self.path("claims", f"{key.replace('/', '-')}.lock"))
        lock = filelock.FileLock(path, thread_local=False)
        try:
            with self.errors_explained():
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextmanager
    def _lease(self, key: str) -> Iterator[bool]:
        path = self.path("claims", f"{key.replace('/', '-')}.lease")
        mine = uuid.uuid4().hex

        def lease() -> bytes:
            return json.dumps({"owner": mine, "renewed": time.time()}).encode()

        held = self.read_text(path)
        if held is not None and time.time() - json.loads(held)["renewed"] > LEASE_SECONDS:
            with suppress(FileNotFoundError):
                self.fs.rm_file(path)
        try:
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self.fs.pipe_file(path, lease(), mode="create")
        except FileExistsError:
            yield False
            return
        done = threading.Event()

        def renew() -> None:
            while not done.wait(LEASE_SECONDS / 6):
                self.fs.pipe_file(path, lease())

        renewal = threading.Thread(target=renew, daemon=True)
        renewal.start()
        try:
            yield True
        finally:
            done.set()
            renewal.join()
            with suppress(FileNotFoundError):
                self.fs.rm_file(path)

    # Files

    def read_text(self, path: str) -> str | None:
        """The text of a file, or None where there is none."""
        try:
            return str(self.fs.cat_file(path).decode())
        except FileNotFoundError:
            return None

    def write_text(self, path: str, text: str) -> None:
        """Write a small file so that it is there whole or not at all."""
        with self.staged(path) as temporary:
            self.fs.pipe_file(temporary, text.encode())

    @contextmanager
    def staged(self, path: str) -> Iterator[str]:
        """A temporary path that becomes `path` when the block ends well and vanishes otherwise."""
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with self.errors_explained():
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                yield temporary
                self.fs.mv(temporary, path)
        finally:
            with suppress(OSError):
                if self.fs.exists(temporary):
                    self.fs.rm_file(temporary)

    def sweep(self, artifact: Artifact, shard: Shard) -> None:
        """Remove what a killed process left half-written; the shard's claim must be ours."""
        for path in self.fs.glob(f"{self.folder(artifact)}/**/*-{shard.suffix}.parquet.*.tmp"):
            self.fs.rm_file(path)

    @contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Turn a full disk into an error that says what to do."""
        with full_disk_explained(self.url, "finished parts are kept"):
            yield

    def write_rows(self, path: str, record: type[RecordT], rows: Iterator[RecordT]) -> int:
        """Write a Parquet file, a row group at a time; returns the number of rows."""
        groups = iter(lambda: list(islice(rows, ROW_GROUP)), [])
        return self.write_tables(path, record, (to_table(record, group) for group in groups))

    def write_tables(self, path: str, record: type[RecordT], tables: Iterable[pa.Table]) -> int:
        """The same from Arrow tables of the record's schema."""
        count = 0
        with (
            self.fs.open(path, "wb") as stream,
            pq.ParquetWriter(stream, schema_of(record), compression="zstd") as writer,
        ):
            for table in tables:
                writer.write_table(table, row_group_size=ROW_GROUP)
                count += table.num_rows
        return count

    def _read(self, path: str) -> pa.Table:
        with self.fs.open(path, "rb") as stream:
            return pq.read_table(stream)


class DiskFull(ServiceError):
    """No space is left: nothing else that is written there would fare better."""


@contextmanager
def full_disk_explained(place: str | Path, kept: str) -> Iterator[None]:
    """Raise DiskFull, naming the place and what is kept there, where the block fills the disk."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull(
            f"{place}: no space left on the disk; free some and run the same again, {kept}"
        ) from error


def _cut(path: str) -> str:
    """Of how many shards a part is one: `008` for `part-003-of-008.parquet`."""
    return path.removesuffix(".parquet").rsplit("-", 1)[-1]
