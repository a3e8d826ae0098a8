"""Load prompts and keep those worth answering; what is removed is a record with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from pydantic import Field

from preferences.config import Config
from preferences.conversations import PromptColumns, prompt_from_row
from preferences.errors import InputError
from preferences.records import Dropped, Prompt
from preferences.tables import read_rows, table_name

SHINGLE_WORDS = 3
"""Near-duplicates are measured over runs of this many words."""
PERMUTATIONS = 128
"""Of the MinHash: the estimate of a Jaccard similarity is off by about 1/√128 = 0.09."""


class Decontamination(Config):
    """Keep evaluation data out of the training data."""

    against: tuple[str, ...]
    """Tables of prompts that must not be trained on."""
    columns: PromptColumns = PromptColumns()
    """Their columns."""
    ngram: int = Field(13, ge=2)
    """A prompt that shares a run of this many words is removed; a shorter one if it is equal."""


class PromptsConfig(Config):
    """Where prompts come from and which are kept."""

    source: str
    """A .jsonl, .json, .csv or .parquet file (or .gz), a `datasets` folder, or a Hub id."""
    split: str = "train"
    """Which split, where the source has several."""
    columns: PromptColumns = PromptColumns()
    """Which columns hold what."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many rows."""
    min_characters: int = Field(1, ge=1)
    """Shorter prompts are removed. The length is that of the last message."""
    max_characters: int = Field(100_000, ge=1)
    """Longer prompts are removed."""
    near_duplicates: float | None = Field(None, gt=0, le=1)
    """Remove a prompt whose Jaccard similarity to an earlier one, over runs of three words,
    is at least this. Equal prompts are always one prompt."""
    decontamination: Decontamination | None = None
    """Remove prompts that overlap with these tables."""


def load_prompts(config: PromptsConfig) -> Iterator[Prompt | Dropped]:
    """The prompts of a source, in its order, and a `Dropped` for each that is removed."""
    return keep_prompts(read_prompts(config), config)


def read_prompts(config: PromptsConfig) -> Iterator[Prompt]:
    """Every row of the source as a prompt; raises InputError on the first that is not one."""
    for number, (place, row) in enumerate(read_rows(config.source, config.split)):
        if config.limit is not None and number >= config.limit:
            return
        yield prompt_from_row(row, config.columns, place)


def keep_prompts(prompts: Iterable[Prompt], config: PromptsConfig) -> Iterator[Prompt | Dropped]:
    """Run the filters in order of cost; the first that matches gives the reason."""
    filters = [partial(_length, config), _equal()]
    if config.decontamination is not None:
        filters.append(_contaminated(config.decontamination))
    if config.near_duplicates is not None:
        filters.append(_near(config.near_duplicates))
    ids: dict[str, Prompt] = {}
    for prompt in prompts:
        _require_one_meaning(ids, prompt)
        for matches in filters:
            if (found := matches(prompt)) is not None:
                reason, detail = found
                # The place tells one removed copy from another.
                record = f"{prompt.prompt_id}@{prompt.source}"
                yield Dropped("prompts", record, prompt.prompt_id, reason, detail)
                break
        else:
            yield prompt


def _require_one_meaning(ids: dict[str, Prompt], prompt: Prompt) -> None:
    """An id that stands for two different prompts would send answers to the wrong one."""
    if prompt.source_id is None:
        return
    earlier = ids.setdefault(prompt.source_id, prompt)
    if earlier.prompt_id != prompt.prompt_id:
        raise InputError(
            f"{prompt.source}: id {prompt.source_id!r} already stands for another prompt "
            f"({earlier.source}); give each prompt its own id"
        )


# Filters: a prompt in, (reason, detail) out, or None to keep it.


def _length(config: PromptsConfig, prompt: Prompt) -> tuple[str, str] | None:
    length = len(prompt.messages[-1].content)
    if length < config.min_characters:
        return "too_short", f"{length} characters"
    if length > config.max_characters:
        return "too_long", f"{length} characters"
    return None


def _equal() -> Any:
    seen: dict[str, str] = {}

    def matches(prompt: Prompt) -> tuple[str, str] | None:
        place = seen.setdefault(prompt.prompt_id, prompt.source)
        return None if place == prompt.source else ("duplicate", f"equal to {place}")

    return matches


def _near(threshold: float) -> Any:
    from datasketch import MinHash, MinHashLSH

    # The index proposes, the exact similarity decides: MinHash alone would remove the unlike.
    index = MinHashLSH(threshold=max(threshold - 0.1, 0.05), num_perm=PERMUTATIONS)
    kept: dict[str, tuple[str, frozenset[str]]] = {}

    def matches(prompt: Prompt) -> tuple[str, str] | None:
        pieces = frozenset(_runs(_words(_text(prompt)), SHINGLE_WORDS))
        if not pieces:
            return None
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([piece.encode() for piece in pieces])
        for other in sorted(index.query(sketch)):
            place, theirs = kept[other]
            similarity = len(pieces & theirs) / len(pieces | theirs)
            if similarity >= threshold:
                return "near_duplicate", f"{similarity:.2f} similar to {place}"
        index.insert(prompt.prompt_id, sketch)
        kept[prompt.prompt_id] = (prompt.source, pieces)
        return None

    return matches


def _contaminated(config: Decontamination) -> Any:
    places: dict[str, str] = {}
    for source in config.against:
        for place, row in read_rows(source):
            words = _words(_text(prompt_from_row(row, config.columns, place)))
            for run in _runs(words, config.ngram):
                places.setdefault(run, place)

    def matches(prompt: Prompt) -> tuple[str, str] | None:
        for run in _runs(_words(_text(prompt)), config.ngram):
            if run in places:
                return "contaminated", f"shares {run[:80]!r} with {places[run]}"
        return None

    return matches


def _text(prompt: Prompt) -> str:
    return "\n".join(m.content for m in prompt.messages if m.role != "system")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str], length: int) -> Iterator[str]:
    """Every run of `length` words; of a shorter text, the whole; of one without words, none."""
    if not words:
        return
    for start in range(max(len(words) - length, 0) + 1):
        yield " ".join(words[start : start + length])


def sources(config: PromptsConfig) -> list[str]:
    """Every table this configuration reads."""
    against = config.decontamination.against if config.decontamination else ()
    return [config.source, *against]


def describe(config: PromptsConfig) -> str:
    """The source as people call it."""
    return table_name(config.source)
