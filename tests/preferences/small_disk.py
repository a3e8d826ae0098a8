"""A disk of so many bytes, which fills up in the middle of a write as a real one does."""

from __future__ import annotations

import errno
import io
import os
from typing import Any

from fsspec.implementations.local import LocalFileOpener, LocalFileSystem


class SmallDisk(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine until `room` bytes are written; then ENOSPC. More room may come."""

    cachable = False

    def __init__(self, room: int, **options: Any) -> None:
        super().__init__(**options)
        self.room = room
        self.times_full = 0

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **options: Any) -> Any:
        opened = LocalFileOpener(path, mode, fs=self, **options)
        if "r" not in mode:
            opened.f.close()
            opened.f = io.BufferedWriter(_Metered(path, self))
        return opened


class _Metered(io.FileIO):
    def __init__(self, path: str, disk: SmallDisk) -> None:
        super().__init__(path, "w")
        self._disk = disk

    def write(self, data: Any) -> int:
        if not self._disk.room and len(data):
            self._disk.times_full += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # The write that meets the end is a short one, as on a real disk.
        written = super().write(memoryview(data)[: self._disk.room])
        self._disk.room -= written
        return written
