"""`bucket://`: what looks to the store like a bucket, shared by processes, without a network."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class Bucket(DirFileSystem):  # type: ignore[misc]
    """The folder that BUCKET names. Objects appear whole; listings are remembered, as s3fs and
    gcsfs remember them, unless they are asked not to."""

    protocol = "bucket"
    cachable = False

    def __init__(self, use_listings_cache: bool = True, **options: Any) -> None:
        super().__init__(os.environ["BUCKET"], fs=LocalFileSystem(auto_mkdir=True), **options)
        self._remembers = use_listings_cache
        self._listed: dict[str, Any] = {}

    def glob(self, path: str, **options: Any) -> Any:
        if path not in self._listed or not self._remembers:
            self._listed[path] = super().glob(path, **options)
        return list(self._listed[path])

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._listed.clear()
        beside = f"{path}.{uuid.uuid4().hex}"
        super().pipe_file(beside, value)
        try:
            if mode == "create":
                os.link(self._join(beside), self._join(path))
            else:
                Path(self._join(beside)).replace(self._join(path))
        finally:
            with suppress(FileNotFoundError):
                Path(self._join(beside)).unlink()

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self._listed.clear()
        super().mv(path1, path2, **options)


fsspec.register_implementation("bucket", Bucket, clobber=True)
