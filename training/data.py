"""Preference pairs as tokens: loading, length filtering, counts.

A dataset is a folder with `data/train-*.parquet` and, for held-out pairs, `data/test-*.parquet` in
TRL's conversational preference form, so that `datasets.load_dataset` reads it too.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preferences.errors import InputError
from preferences.records import Dropped, Messages, messages_from

COLUMNS = ("prompt", "chosen", "rejected", "prompt_id", "chosen_id", "rejected_id", "probability")

TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids", "probability", "prompt_id")

READ_ROWS = 1024

Labels = Literal["hard", "soft"]
Balance = Literal["pairs", "prompts"]


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """What became of a split's pairs. Rows = kept + the dropped ones."""

    rows: int
    kept: int
    dropped: dict[str, int]
    """By reason: `prompt_too_long`, `answer_too_long`, `identical_answers` or
    `refused_by_template`."""
    boundary_shifted: int
    """Kept pairs whose template renders the prompt differently before an answer than alone; the
    answer then starts where the two part."""
    without_end: int
    """Kept pairs with an answer that no end token closes: such training teaches not to stop."""
    answers_left_out: int = 0
    """Answers that are too long, of kept prompts, where a row is a prompt with several answers."""


@dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """A prompt to sample on."""

    prompt_id: str
    messages: Messages
    ids: tuple[int, ...]
    """Its tokens, up to where the assistant answers."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """One split, tokenized."""

    rows: Any
    """A `datasets.Dataset` with `prompt_ids`, `chosen_ids`, `rejected_ids`, `probability` and
    `prompt_id`. An answer's tokens include the one that ends it."""
    prompts: tuple[HeldOutPrompt, ...]
    """Its distinct prompts in the order of their ids, which is random and stable."""
    counts: SplitCounts
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt and answers to it as token ids, each answer behind the same ones."""

    asked: list[int]
    """The prompt by itself, up to where the assistant answers."""
    start: int
    """How many of these stand before every answer too."""
    answers: list[list[int]]
    """With the token that ends each."""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One pair as token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    boundary_shifted: bool
    without_end: bool


def load_pairs(
    dataset: Path, split: str, tokenizer: Any, *, ends: Collection[int], max_length: int
) -> Pairs | None:
    """The pairs of a split, or None where the dataset has no such split.

    `max_length` counts prompt and answer tokens together; a longer pair is dropped, never cut: a
    cut answer has no end token and teaches the model not to stop.
    """
    import datasets

    files = sorted((dataset / "data").glob(f"{split}-*.parquet"))
    if not files:
        return None
    columns: dict[str, list[Any]] = {name: [] for name in TOKENIZED}
    prompts: dict[str, HeldOutPrompt] = {}
    dropped: list[Dropped] = []
    shifted = unended = 0
    for row in pair_rows(files):
        pair, reason, detail = _tokenize(row, tokenizer, ends, max_length)
        if pair is None:
            pair_id = f"{row['chosen_id']}>{row['rejected_id']}"
            dropped.append(Dropped("training", pair_id, row["prompt_id"], reason, detail))
            continue
        shifted += pair.boundary_shifted
        unended += pair.without_end
        ids = pair.prompt, pair.chosen, pair.rejected
        for name, value in zip(
            TOKENIZED, (*ids, row["probability"], row["prompt_id"]), strict=True
        ):
            columns[name].append(value)
        if row["prompt_id"] not in prompts:
            asked = tuple(_render(tokenizer, row["prompt"], add_generation_prompt=True))
            messages = messages_from(row["prompt"])
            prompts[row["prompt_id"]] = HeldOutPrompt(row["prompt_id"], messages, asked)
    reasons = [drop.reason for drop in dropped]
    kept = len(columns["prompt_id"])
    counts = SplitCounts(
        rows=kept + len(dropped),
        kept=kept,
        dropped={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        boundary_shifted=shifted,
        without_end=unended,
    )
    if not kept:
        raise InputError(_nothing_left(dataset, split, counts, dropped, max_length))
    ordered = tuple(prompts[prompt_id] for prompt_id in sorted(prompts))
    return Pairs(datasets.Dataset.from_dict(columns), ordered, counts, tuple(dropped))


def labelled_rows(pairs: Pairs, labels: Labels, balance: Balance) -> Any:
    """The rows with what the loss takes their labels for: a `probability` and a `weight`.

    Weights have the mean 1, so that the learning rate keeps its meaning. Raises InputError where a
    soft label is wanted and a pair has no probability.
    """
    prompt_ids = list(pairs.rows["prompt_id"])
    probabilities = list(pairs.rows["probability"]) if labels == "soft" else [1.0] * len(prompt_ids)
    for prompt_id, probability in zip(prompt_ids, probabilities, strict=True):
        require_probability(prompt_id, probability)
    weights = _prompt_weights(prompt_ids) if balance == "prompts" else [1.0] * len(prompt_ids)
    rows = pairs.rows.remove_columns("probability").add_column("probability", probabilities)
    return rows.add_column("weight", weights)


def require_probability(prompt_id: str, probability: float | None) -> None:
    """Raises InputError unless a pair of this prompt has a probability."""
    # Written so that a NaN fails too.
    if probability is None or not 0 <= probability <= 1:
        raise InputError(
            f"prompt {prompt_id}: a pair's probability is {probability}, and soft labels need "
            "one between 0 and 1; mend the dataset or say labels: hard"
        )


def with_margins(pairs: Pairs, dataset: Path, split: str, share: float) -> Pairs:
    """The pairs with a column `margin`: so large a share of each pair's own, in logits.

    Raises InputError where a share is wanted and a pair has no margin.
    """
    margins = [0.0] * pairs.counts.kept
    if share:
        dropped = {drop.record_id for drop in pairs.dropped}
        found = pair_margins(sorted((dataset / "data").glob(f"{split}-*.parquet")))
        margins = [share * margin for pair_id, margin in found if pair_id not in dropped]
    return dataclasses.replace(pairs, rows=pairs.rows.add_column("margin", margins))


def pair_margins(files: Sequence[Path]) -> Iterator[tuple[str, float]]:
    """Every pair's id, as it stands in what is dropped, and its margin.

    Raises InputError where a pair has none.
    """
    import pyarrow.parquet as pq

    for file in files:
        if "margin" not in pq.read_schema(file).names:
            raise InputError(f"{file}: no column margin; say margin: 0, or add it to the dataset")
        for row in pq.read_table(file, columns=["chosen_id", "rejected_id", "margin"]).to_pylist():
            pair_id, margin = f"{row['chosen_id']}>{row['rejected_id']}", row["margin"]
            if margin is None or not math.isfinite(margin):
                raise InputError(
                    f"{file}: pair {pair_id}: its margin is {margin}; mend the dataset or say "
                    "margin: 0"
                )
            yield pair_id, margin


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """One answer to a prompt as token ids."""

    prompt: list[int]
    answer: list[int]
    """With the token that ends it."""
    boundary_shifted: bool
    without_end: bool


def tokenize_answer(
    prompt: list[dict[str, str]],
    answer: list[dict[str, str]],
    tokenizer: Any,
    *,
    ends: Collection[int],
    max_length: int,
) -> tuple[TokenAnswer | None, str, str]:
    """A prompt and its answer, both as messages, by the chat template; or why there is no such
    thing: a reason that can be counted, as in `SplitCounts`, and its detail."""
    from jinja2 import TemplateError

    try:
        asked = _render(tokenizer, prompt, add_generation_prompt=True)
        answered = _render(tokenizer, prompt + answer)
    except TemplateError as error:
        return None, "refused_by_template", str(error)
    start = _common_prefix(asked, answered)
    ids = _without_tail(answered[start:], tokenizer, ends)
    if len(asked) >= max_length:
        return None, "prompt_too_long", f"{len(asked)} tokens"
    if start + len(ids) > max_length:
        return None, "answer_too_long", f"{start + len(ids)} tokens with the prompt"
    if not ids:
        return None, "empty_answer", ""
    unended = ids[-1] not in ends
    return TokenAnswer(asked[:start], ids, start < len(asked), unended), "", ""


def held_out_prompt(prompt_id: str, prompt: list[dict[str, str]], tokenizer: Any) -> HeldOutPrompt:
    """A prompt, given as messages, to sample on."""
    asked = tuple(_render(tokenizer, prompt, add_generation_prompt=True))
    return HeldOutPrompt(prompt_id, messages_from(prompt), asked)


def _prompt_weights(prompt_ids: Sequence[str]) -> list[float]:
    """Weights by which every prompt counts alike, however many pairs it has."""
    pairs = Counter(prompt_ids)
    each = len(prompt_ids) / len(pairs)
    return [each / pairs[prompt_id] for prompt_id in prompt_ids]


def pair_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The pairs of these files with what is trained on; InputError where there is no such thing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            source = pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: not a readable Parquet file ({error})") from None
        with source:
            missing = [name for name in COLUMNS if name not in source.schema_arrow.names]
            if missing:
                raise InputError(
                    f"{file}: no column {', '.join(missing)}; a preference dataset has "
                    f"{', '.join(COLUMNS)}"
                )
            for batch in source.iter_batches(READ_ROWS, columns=list(COLUMNS)):
                yield from batch.to_pylist()


def _tokenize(
    row: dict[str, Any], tokenizer: Any, ends: Collection[int], max_length: int
) -> tuple[TokenPair | None, str, str]:
    """The pair, or why there is none: a reason that can be counted and its detail."""
    from jinja2 import TemplateError

    try:
        both = render_together(row["prompt"], [row["chosen"], row["rejected"]], tokenizer, ends)
    except TemplateError as error:
        # Some templates know no system turn, or want turns to alternate.
        return None, "refused_by_template", str(error)
    asked, start, answers = both.asked, both.start, both.answers
    longest = start + max(len(answer) for answer in answers)
    if len(asked) >= max_length:
        return None, "prompt_too_long", f"{len(asked)} tokens"
    if longest > max_length:
        return None, "answer_too_long", f"{longest} tokens with the prompt"
    if answers[0] == answers[1]:
        return None, "identical_answers", ""
    unended = any(not answer or answer[-1] not in ends for answer in answers)
    pair = TokenPair(asked[:start], answers[0], answers[1], start < len(asked), unended)
    return pair, "", ""


def render_together(
    prompt: list[dict[str, str]],
    answers: Sequence[list[dict[str, str]]],
    tokenizer: Any,
    ends: Collection[int],
) -> Rendered:
    """A prompt and answers to it, all as messages, by the chat template.

    Raises jinja2.TemplateError where the template refuses them.
    """
    asked = _render(tokenizer, prompt, add_generation_prompt=True)
    answered = [_render(tokenizer, prompt + answer) for answer in answers]
    start = min(_common_prefix(asked, ids) for ids in answered)
    told = [_without_tail(ids[start:], tokenizer, ends) for ids in answered]
    return Rendered(asked, start, told)


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(rendered["input_ids"])


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    different = (i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b)
    return next(different, min(len(ids), len(others)))


def _without_tail(answer: list[int], tokenizer: Any, ends: Collection[int]) -> list[int]:
    """The answer up to its end token: the newline that templates put after it is never sampled."""
    last = next((i for i in reversed(range(len(answer))) if answer[i] in ends), None)
    if last is None or tokenizer.decode(answer[last + 1 :]).strip():
        return answer
    return answer[: last + 1]


def _nothing_left(
    dataset: Path, split: str, counts: SplitCounts, dropped: Sequence[Dropped], max_length: int
) -> str:
    if not dropped:
        return f"{dataset}: the {split} split has no pairs"
    why = ", ".join(f"{reason} {number}" for reason, number in counts.dropped.items())
    first = f"the first: {dropped[0].detail}" if dropped[0].detail else "no detail"
    return (
        f"{dataset}: none of the {counts.rows} {split} pairs can be trained on ({why}; {first}); "
        f"raise max_length, now {max_length}, or mend the dataset"
    )
