"""What was asked and answered, call by call, so that no answer is ever paid for twice.

    journal/<who answers>/<first bucket>-<last bucket>-<writer>.jsonl

A line is written the moment a reply arrives. Each process writes files of its own; a line torn by
a crash is skipped when read, so its call is owed again. The key of a call is the fingerprint of
everything that can change the reply; the buckets (the leading byte of the prompt id) let a shard
read only the files that can hold its calls, however the shards were cut when they were written.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from preferences.store import Shard, Store

FLUSH_SECONDS = 1.0
"""In a bucket, where files cannot grow, replies are put together for this long."""


class Journal:
    """The calls of one shard to one answerer: those on record, and a place for new ones."""

    def __init__(self, store: Store, answerer: str, shard: Shard) -> None:
        self._store = store
        self._folder = store.path("journal", answerer)
        self._range = shard.buckets
        self._recorded = dict(self._read())
        self._lines: list[str] = []
        self._stream: Any = None
        self._flushed = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        finally:
            if self._stream is not None:
                # Closing writes what a full disk did not take before.
                with self._store.errors_explained():
                    self._stream.close()

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply on record for this call, or None if it is owed."""
        return self._recorded.get(key)

    def put(self, key: str, reply: dict[str, Any]) -> None:
        """Record a reply. In a folder it is safe from a crash of this process when this returns."""
        self._lines.append(json.dumps({"key": key, "reply": reply}) + "\n")
        if self._store.is_local or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand what was put to the file system."""
        self._flushed = time.monotonic()
        if not self._lines:
            return
        text = "".join(self._lines).encode()
        self._lines.clear()
        if not self._store.is_local:
            self._store.fs.pipe_file(self._new_path(), text)
            return
        with self._store.errors_explained():
            if self._stream is None:
                self._store.fs.makedirs(self._folder, exist_ok=True)
                self._stream = self._store.fs.open(self._new_path(), "wb")
            self._stream.write(text)
            self._stream.flush()

    def _new_path(self) -> str:
        first, last = self._range
        return f"{self._folder}/{first:02x}-{last:02x}-{uuid.uuid4().hex}.jsonl"

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted(self._store.fs.glob(f"{self._folder}/*.jsonl")):
            first, last, _ = str(path).rsplit("/", 1)[-1].split("-", 2)
            if int(first, 16) > self._range[1] or int(last, 16) < self._range[0]:
                continue
            for line in self._store.fs.cat_file(path).splitlines():
                try:
                    entry = json.loads(line)
                    key, reply = entry["key"], entry["reply"]
                except (ValueError, KeyError, TypeError):
                    continue  # Torn: the call is owed again.
                if isinstance(key, str) and isinstance(reply, dict):
                    yield key, reply
