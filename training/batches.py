"""An update's examples in batches of bounded tokens.

Examples differ in length, so a fixed number of them is little memory in one batch and too much in
the next. With `batch_tokens`, an update is made of `batch_size` examples as ever, drawn as ever,
and only the batches that they are computed in follow from their lengths: as few as fit. Their
losses are weighted such that the update's is the mean over its examples. So the budget changes
memory and time and nothing that is learnt, and the steps of an epoch, the schedule and what a
resumed run skips are those of fixed batches. (It is verl's `use_dynamic_bsz`. Where batches of so
many tokens are updates themselves, as by fairseq's `--max-tokens`, a pair counts for more the fewer
it stands among.)

What an example costs depends on the forward pass:

| forward pass | tokens of a batch | batches |
|---|---|---|
| each token once (`training.shared_prefix`) | the sum of its examples' | evenly full, any lengths |
| with padding | its rows times the longest | of similar lengths, the longest first |

Bucketing by length stays inside an update, so which examples an update is made of is a fair draw.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.settings import TrainingConfig

ANSWERS = ("chosen_ids", "rejected_ids", "answer_ids", "completion_ids", "input_ids")
"""Columns of which each stands behind the row's prompt, if there is one, and is trained on."""

LISTS = "answers_ids"
"""A column of several answers in place of these."""


@dataclass(frozen=True, slots=True)
class Size:
    """What an example is to the forward pass."""

    tokens: int
    """With the prompt once."""
    longest: int
    """Tokens of its longest row: prompt and answer."""
    rows: int
    """How many rows it is, where each answer has its own."""


Batch = tuple[int, dict[str, Any]]
"""Its number of examples, and what the model and the loss take."""


def size_of(prompt: int, answers: Sequence[int]) -> Size:
    """Of an example with so many tokens of prompt and of each answer."""
    return Size(prompt + sum(answers), prompt + max(answers), len(answers))


def sizes_of(rows: Any) -> list[Size]:
    """Of every row of a `datasets.Dataset` with answers as tokens; nothing where it has none."""
    import pyarrow.compute as pc

    names = [name for name in ("prompt_ids", *ANSWERS) if name in rows.column_names]
    table = rows.select_columns(names).with_format("arrow")[:]
    lengths = {name: pc.list_value_length(table[name]).to_pylist() for name in names}
    before = lengths.pop("prompt_ids", None) or [0] * len(rows)
    if LISTS in rows.column_names:
        answers = [[len(answer) for answer in answers] for answers in rows[LISTS]]
    else:
        answers = [list(each) for each in zip(*lengths.values(), strict=True)]
    if not answers:
        return []
    return [size_of(prompt, each) for prompt, each in zip(before, answers, strict=True)]


def _size(row: Mapping[str, Any]) -> Size:
    answers = row[LISTS] if LISTS in row else [row[name] for name in ANSWERS if name in row]
    return size_of(len(row.get("prompt_ids", ())), [len(answer) for answer in answers])


def evenly(sizes: Sequence[Size], budget: int) -> list[list[int]]:
    """Places of the examples, in the fewest batches of at most `budget` tokens that are found by
    putting each, the longest first, into the emptiest (Graham 1969). What is longer alone is alone.
    """
    alone = [[i] for i, size in enumerate(sizes) if size.tokens > budget]
    others = [i for i, size in enumerate(sizes) if size.tokens <= budget]
    if not others:
        return alone
    others.sort(key=lambda i: (-sizes[i].tokens, i))
    least = math.ceil(sum(sizes[i].tokens for i in others) / budget)
    for number in itertools.count(max(least, 1)):
        batches: list[list[int]] = [[] for _ in range(number)]
        room = [(0, batch) for batch in range(number)]
        for i in others:
            taken, batch = heapq.heappop(room)
            batches[batch].append(i)
            heapq.heappush(room, (taken + sizes[i].tokens, batch))
        if max(room)[0] <= budget:
            return alone + [batch for batch in batches if batch]
    raise AssertionError("unreachable")


def padded(sizes: Sequence[Size], budget: int, by_length: bool = True) -> list[list[int]]:
    """Places of the examples, in batches whose rows times the longest of them are at most `budget`
    tokens, by length or in the order given. What is longer alone is alone."""
    order = list(range(len(sizes)))
    if by_length:
        order.sort(key=lambda i: (-sizes[i].longest, i))
    batches: list[list[int]] = []
    rows = longest = 0
    for i in order:
        rows, longest = rows + sizes[i].rows, max(longest, sizes[i].longest)
        if not batches or rows * longest > budget:
            batches.append([])
            rows, longest = sizes[i].rows, sizes[i].longest
        batches[-1].append(i)
    return batches


def told(config: TrainingConfig, rows: Any) -> list[str]:
    """What an update and its batches are in tokens, and what does not fit, in lines for people;
    nothing where answers are yet to be sampled.

    Tokens are counted without padding and with the prompt of several answers once.
    """
    sizes = [] if rows is None else sizes_of(rows)
    if not sizes or (config.method == "sft" and getattr(config, "packing", False)):
        return []
    mean = sum(size.tokens for size in sizes) / len(sizes)
    line = f"tokens: about {mean * config.update:,.0f} an update"
    if config.batch_tokens is None:
        return [line]
    lines = [f"{line}, in batches of at most {config.batch_tokens:,}"]
    too_long = sum(size.tokens > config.batch_tokens for size in sizes)
    if too_long:
        lines.append(
            f"warning: {too_long:,} of {len(sizes):,} examples have more than batch_tokens; each "
            "is a batch of its own"
        )
    return lines


class TokenBatches:
    """Goes before a trainer of TRL's: with `batch_tokens`, updates are computed in such batches."""

    batch_tokens: int | None = None
    by_length = True
    """Whether padded batches are of similar lengths; not where the loss reads its whole batch,
    which then has to be a sample."""
    current_gradient_accumulation_steps: Any
    data_collator: Any
    model: Any
    _metrics: Any

    def get_train_dataloader(self) -> Any:
        """Of updates, each as a list of batches."""
        trl: Any = super()
        collate = self.data_collator
        if self.batch_tokens is not None:
            self.data_collator = functools.partial(self._in_batches, collate)
        try:
            return trl.get_train_dataloader()
        finally:
            self.data_collator = collate

    def _in_batches(
        self, collate: Callable[[list[Any]], dict[str, Any]], rows: Sequence[Mapping[str, Any]]
    ) -> list[Batch]:
        from training.shared_attention import NAME

        assert self.batch_tokens is not None
        sizes = [_size(row) for row in rows]
        if self.model.config._attn_implementation == NAME:
            places = evenly(sizes, self.batch_tokens)
        else:
            places = padded(sizes, self.batch_tokens, self.by_length)
        return [(len(batch), collate([rows[i] for i in batch])) for batch in places]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The gradients of an update, added to those there are; its loss."""
        trl: Any = super()
        if self.batch_tokens is None:
            return trl.training_step(model, inputs, num_items_in_batch)
        examples = sum(number for number, _ in inputs)
        metrics = _Weighted(self._metrics["train"])
        losses = []
        for number, batch in inputs:
            # The trainer divides a batch's mean by this: its share of the update's mean is left.
            self.current_gradient_accumulation_steps = examples / number
            losses.append(trl.training_step(model, batch, num_items_in_batch))
            metrics.add(number)
        metrics.close()
        return sum(losses)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        trl: Any = super()
        return trl._get_num_items_in_batch(_apart(batch_samples), device)

    def floating_point_ops(self, inputs: Any) -> Any:
        """Of an update's batches together."""
        trl: Any = super()
        return sum(trl.floating_point_ops(batch) for batch in _apart([inputs]))


class _Weighted:
    """Metrics that an update's batches append to TRL's lists, made into one value each: the mean by
    numbers of examples."""

    def __init__(self, metrics: dict[str, list[float]]) -> None:
        self.metrics = metrics
        self.start = {name: len(values) for name, values in metrics.items()}
        self.seen = dict(self.start)
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, number: int) -> None:
        """A batch of so many examples is done."""
        for name, values in self.metrics.items():
            new = values[self.seen.get(name, 0) :]
            total, weight = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + number * sum(new), weight + number * len(new)
            self.seen[name] = len(values)

    def close(self) -> None:
        """The update is done."""
        for name, (total, weight) in self.sums.items():
            start = self.start.get(name, 0)
            if len(self.metrics[name]) > start + 1:
                self.metrics[name][start:] = [total / weight]


def _apart(updates: Sequence[Any]) -> list[dict[str, Any]]:
    """All batches of updates; evaluation has them without a list."""
    return [
        batch
        for update in updates
        for batch in ([b for _, b in update] if isinstance(update, list) else [update])
    ]
