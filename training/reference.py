"""The reference's log-probabilities, kept on disk: they depend on the base model and the data
alone, so runs that differ in anything else share them.

They are needed beforehand where what trains cannot be switched off. This module imports torch at
its head, so it is imported inside functions only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from preferences.fingerprint import fingerprint

FOLDER = "reference"


class CachedReference:
    """Goes before a trainer of TRL's that computes them, in whose own cache they would end with
    the process."""

    accelerator: Any
    args: Any
    processing_class: Any
    _precompute_model_hash: Any

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # Another batch size pads differently, which changes the last digits.
        computed = [self.accelerator.device.type, self.args.bf16, self.args.fp16, batch_size]
        key = fingerprint([self._precompute_model_hash, tokens_identity(dataset), computed])
        file = cache_folder() / FOLDER / f"{key}.json"
        columns = read_columns(file, len(dataset))
        if columns is None:
            trl: Any = super()
            whole = trl._precompute_ref_logps(dataset, name, batch_size)
            new = [column for column in whole.column_names if column not in dataset.column_names]
            columns = {column: list(whole[column]) for column in new}
            with contextlib.suppress(OSError):  # a cache that cannot be written only saves nothing
                write_columns(file, columns)
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset


def tokens_identity(dataset: Any) -> str:
    """Content identity of the token columns of a dataset, in its order."""
    digest = hashlib.sha256()
    names = sorted(name for name in dataset.column_names if name.endswith("_ids"))
    digest.update(json.dumps(names).encode())
    for row in dataset.select_columns(names):
        digest.update(json.dumps([row[name] for name in names]).encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where what can be computed again is kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairwright"


def read_columns(file: Path, rows: int) -> dict[str, list[float]] | None:
    """The columns in a file, or None where there is none that is whole and has as many rows."""
    try:
        columns: dict[str, list[float]] = json.loads(file.read_text())["columns"]
        whole = bool(columns) and all(
            len(values) == rows and bool(torch.isfinite(torch.tensor(values)).all())
            for values in columns.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None
    return columns if whole else None


def write_columns(file: Path, columns: Mapping[str, list[float]]) -> None:
    """Columns of numbers into a file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"columns": columns}))
    part.replace(file)
