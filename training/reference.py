"""The reference's log-probabilities, kept on disk by answer: they depend on the base model and the
tokens alone, so another adapter, another method and a dataset that shares answers find them there.

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from trl.trainer.utils import hash_module

from preferences.fingerprint import fingerprint
from training import models, processes
from training.sampling import undisturbed
from training.settings import TrainingConfig

FOLDER = "reference"

COLUMNS = {
    "chosen_ids": "ref_chosen_logps",
    "rejected_ids": "ref_rejected_logps",
    "completion_ids": "ref_logps",
    "KL_completion_ids": "ref_KL_logps",
}
"""Of answers as tokens, and TRL's of their log-probabilities."""

LISTS = ("ref_chosen_logps", "ref_rejected_logps")
"""Where answers stand in a list, that of the first, and those of the others."""


def beforehand(config: TrainingConfig, rows: int) -> bool:
    """Whether to ask the reference before training, of so many examples, and not in every step.

    Where what trains cannot be switched off, there is no other way. Where it can, it costs nothing
    more if each example comes up at least once, and later epochs and runs are spared.
    """
    if not models.has_adapter(config.weights):
        return True
    if config.max_steps is not None:
        return config.max_steps * config.update >= rows
    return (config.epochs or 1) >= 1


def _bars() -> dict[str, str]:
    return {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}


class CachedReference:
    """Goes before a trainer of TRL's that computes them, in whose own cache they would end with
    the process."""

    accelerator: Any
    args: Any
    model: Any
    base: str
    """What the weights are that the reference has."""

    def __init__(self, *args: Any, **values: Any) -> None:
        if values["args"].precompute_ref_log_probs:
            self.base = hash_module(values["model"])  # before there is an adapter on it
        super().__init__(*args, **values)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # What decides more than the last digits, and the forward pass, which may decide these.
        forward = self.model.config._attn_implementation
        computed = [self.accelerator.device.type, self.args.bf16, self.args.fp16, forward]
        wanted = answers_of(dataset)
        together = self.args.per_device_eval_batch_size, processes.count()
        # A run finds its own numbers again, to the last digit, whatever others have added.
        own = fingerprint([wanted, together])
        file = cache_folder() / FOLDER / f"{fingerprint([self.base, computed])}-{own}.json"
        answers = {answer for column in wanted.values() for row in column for answer in row}
        known = processes.from_main(lambda: read_log_probs(file, answers))
        missing = [
            row
            for row in range(len(dataset))
            if not all(answer in known for column in wanted.values() for answer in column[row])
        ]
        if missing:
            trl: Any = super()
            some = dataset.select(missing) if len(missing) < len(dataset) else dataset
            # A run that finds all of them draws no random numbers here either.
            with undisturbed(self.model), mock.patch.dict(os.environ, _bars()):
                found = trl._precompute_ref_logps(some, name, together[0])
            for column, rows in wanted.items():
                for row, values in zip(missing, found[column], strict=True):
                    listed = values if isinstance(values, list) else [values]
                    # Shorter lists are filled up.
                    for answer, value in zip(rows[row], listed, strict=False):
                        known.setdefault(answer, value)
        if processes.is_main():
            with contextlib.suppress(OSError):  # a cache that cannot be written only saves nothing
                write_log_probs(file, {answer: known[answer] for answer in sorted(answers)})
        for column, rows in wanted.items():
            each = [[known[answer] for answer in row] for row in rows]
            others = column == LISTS[1] and "answers_ids" in dataset.column_names
            dataset = dataset.add_column(column, each if others else [one for (one,) in each])
        return dataset


def answers_of(dataset: Any) -> dict[str, list[list[str]]]:
    """For each of TRL's columns, the answers that every row of it is about, by the content identity
    of prompt and answer."""
    prompts = dataset["prompt_ids"]
    if "answers_ids" in dataset.column_names:
        lists = [
            [_identity(prompt, answer) for answer in answers]
            for prompt, answers in zip(prompts, dataset["answers_ids"], strict=True)
        ]
        return dict(zip(LISTS, ([r[:1] for r in lists], [r[1:] for r in lists]), strict=True))
    return {
        theirs: [
            [_identity(prompt, answer)]
            for prompt, answer in zip(prompts, dataset[ours], strict=True)
        ]
        for ours, theirs in COLUMNS.items()
        if ours in dataset.column_names
    }


def _identity(prompt: list[int], answer: list[int]) -> str:
    return hashlib.sha256(json.dumps([prompt, answer]).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """Where what can be computed again is kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairwright"


def read_log_probs(file: Path, answers: Collection[str]) -> dict[str, float]:
    """Of answers: what the file has, if it has all, and otherwise what any file of the same
    reference has. A torn file has nothing."""
    found = _read(file)
    if not all(answer in found for answer in answers):
        reference = file.name.partition("-")[0]
        for other in sorted(file.parent.glob(f"{reference}-*.json")):
            found = _read(other) | found
    return {answer: found[answer] for answer in answers if answer in found}


def _read(file: Path) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads(file.read_text())["log_probs"]
        whole = all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found if whole else {}


def write_log_probs(file: Path, found: Mapping[str, float]) -> None:
    """Answers' log-probabilities into a file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"log_probs": found}))
    part.replace(file)
