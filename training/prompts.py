"""Prompts alone, for methods that learn from what the policy itself answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preferences.errors import InputError
from preferences.records import Dropped
from training.data import READ_ROWS, HeldOutPrompt, SplitCounts, held_out_prompt


@dataclass(frozen=True, slots=True)
class Prompts:
    """The distinct prompts of one split. Rows are counted by prompt, not by pair."""

    prompts: tuple[HeldOutPrompt, ...]
    """In the order of their ids, which is random and stable."""
    counts: SplitCounts
    dropped: tuple[Dropped, ...]
    rows: None = None
    """There are no answers to train on."""


def load_prompts(
    dataset: Path, split: str, tokenizer: Any, *, max_length: int, max_tokens: int
) -> Prompts | None:
    """The prompts of a split, or None where the dataset has no such split.

    Reads the columns `prompt` and `prompt_id`, so a preference dataset will do. A prompt that
    leaves less room than `max_tokens` in `max_length` is dropped.
    """
    from jinja2 import TemplateError

    files = sorted((dataset / "data").glob(f"{split}-*.parquet"))
    if not files:
        return None
    found: dict[str, HeldOutPrompt] = {}
    dropped: dict[str, Dropped] = {}
    for prompt_id, messages in _rows(files):
        if prompt_id in found or prompt_id in dropped:
            continue
        try:
            prompt = held_out_prompt(prompt_id, messages, tokenizer)
        except TemplateError as error:
            reason, detail = "refused_by_template", str(error)
        else:
            if len(prompt.ids) + max_tokens <= max_length:
                found[prompt_id] = prompt
                continue
            reason, detail = "prompt_too_long", f"{len(prompt.ids)} tokens"
        dropped[prompt_id] = Dropped("training", prompt_id, prompt_id, reason, detail)
    if not found:
        why = next(iter(dropped.values()), None)
        raise InputError(
            f"{dataset}: none of the {len(dropped)} {split} prompts leaves room for an answer"
            f"{f' (the first: {why.reason}, {why.detail})' if why else ''}; raise max_length, now "
            f"{max_length}, or lower max_tokens, now {max_tokens}"
        )
    reasons = [drop.reason for drop in dropped.values()]
    counts = SplitCounts(
        rows=len(found) + len(dropped),
        kept=len(found),
        dropped={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        boundary_shifted=0,
        without_end=0,
    )
    ordered = tuple(found[prompt_id] for prompt_id in sorted(found))
    return Prompts(ordered, counts, tuple(dropped.values()))


def _rows(files: list[Path]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["prompt_id", "prompt"]
    for file in files:
        try:
            source = pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: not a readable Parquet file ({error})") from None
        with source:
            missing = [name for name in columns if name not in source.schema_arrow.names]
            if missing:
                raise InputError(f"{file}: no column {', '.join(missing)}; mend the dataset")
            for batch in source.iter_batches(READ_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield row["prompt_id"], row["prompt"]
