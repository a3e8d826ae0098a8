"""Ranked answers as tokens: the pairs of one prompt together, each answer once.

A dataset holds a ranking as its pairs, which assembly has made certain enough, different enough and
the right way round. What no pair says of two answers is left open: they are tied, or too alike, or
nobody was sure.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preferences.errors import InputError
from preferences.records import Dropped
from training.data import (
    HeldOutPrompt,
    SplitCounts,
    held_out_prompt,
    pair_margins,
    pair_rows,
    render_together,
)

COLUMNS = ("prompt_ids", "answers_ids", "better", "worse", "probability", "margin", "prompt_id")

Places = tuple[int, int]
"""Of two answers in a list, the better one first."""


@dataclass(frozen=True, slots=True)
class Lists:
    """One split, tokenized."""

    rows: Any
    """A `datasets.Dataset`, a row a prompt: `prompt_ids`; `answers_ids`, its answers from the best
    to the worst, each with the token that ends it; and its pairs, as places among these, in
    `better`, `worse`, `probability` and `margin`; `prompt_id`."""
    prompts: tuple[HeldOutPrompt, ...]
    """Its prompts in the order of their ids, which is random and stable."""
    counts: SplitCounts
    """Of prompts."""
    dropped: tuple[Dropped, ...]
    """Prompts, and single answers that are too long."""

    @property
    def longest(self) -> int:
        """The most answers that a prompt has."""
        return max(map(len, self.rows["answers_ids"]))


@dataclass(slots=True)
class RankedPrompt:
    """A prompt and what its pairs say, as it is read."""

    prompt_id: str
    prompt: list[dict[str, str]]
    answers: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """By their ids."""
    pairs: list[tuple[str, str, float | None]] = field(default_factory=list)
    """Ids of the better and the worse one, and how sure that is."""


@dataclass(frozen=True, slots=True)
class TokenList:
    """A prompt and its ranked answers as token ids."""

    prompt: list[int]
    answers: list[list[int]]
    """From the best to the worst; equal ones are one."""
    pairs: list[tuple[Places, float | None, float]]
    """With probability and margin."""
    too_long: dict[str, int]
    """Answers that are not among these, and their tokens with the prompt."""
    boundary_shifted: bool
    without_end: bool


def load_lists(
    dataset: Path,
    split: str,
    tokenizer: Any,
    *,
    ends: Collection[int],
    max_length: int,
    margins: bool = False,
    rankable: bool = False,
) -> Lists | None:
    """The ranked answers of a split, or None where the dataset has no such split.

    `max_length` counts the prompt and one answer; a longer answer is left out, and its prompt is
    kept where two others are. Without `margins` they are 0 and the dataset needs none. `rankable`
    drops prompts of whose pairs `training.plackett_luce` knows no probability.
    """
    import datasets

    files = sorted((dataset / "data").glob(f"{split}-*.parquet"))
    if not files:
        return None
    margin_of = dict(pair_margins(files)) if margins else {}
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    prompts: list[HeldOutPrompt] = []
    dropped: list[Dropped] = []
    left_out: list[Dropped] = []
    shifted = unended = 0
    for ranked in by_prompt(pair_rows(files)):
        found, reason, detail = _tokenize(ranked, margin_of, tokenizer, ends, max_length)
        if found is None:
            dropped.append(_dropped(ranked, ranked.prompt_id, reason, detail))
            continue
        if rankable and (why := _why_not_ranked(found)) is not None:
            dropped.append(_dropped(ranked, ranked.prompt_id, "not_rankable", why))
            continue
        left_out += [
            _dropped(ranked, name, "answer_too_long", f"{tokens} tokens with the prompt")
            for name, tokens in found.too_long.items()
        ]
        shifted += found.boundary_shifted
        unended += found.without_end
        places, probabilities, apart = zip(*found.pairs, strict=True)
        better, worse = zip(*places, strict=True)
        row = (found.prompt, found.answers, better, worse, probabilities, apart, ranked.prompt_id)
        for name, value in zip(COLUMNS, row, strict=True):
            columns[name].append(value)
        prompts.append(held_out_prompt(ranked.prompt_id, ranked.prompt, tokenizer))
    counts = SplitCounts(
        rows=len(prompts) + len(dropped),
        kept=len(prompts),
        dropped=dict(sorted(Counter(drop.reason for drop in dropped).items())),
        boundary_shifted=shifted,
        without_end=unended,
        answers_left_out=len(left_out),
    )
    if not prompts:
        why = ", ".join(f"{reason} {number}" for reason, number in counts.dropped.items())
        raise InputError(
            f"{dataset}: none of the {counts.rows} prompts of the {split} split can be trained on "
            f"({why or 'it has no pairs'}); raise max_length, now {max_length}, or mend the dataset"
        )
    ordered = tuple(sorted(prompts, key=lambda prompt: prompt.prompt_id))
    return Lists(datasets.Dataset.from_dict(columns), ordered, counts, (*dropped, *left_out))


def by_prompt(rows: Iterable[Mapping[str, Any]]) -> list[RankedPrompt]:
    """The pairs of each prompt together, in the order in which prompts first come."""
    found: dict[str, RankedPrompt] = {}
    for row in rows:
        prompt_id = row["prompt_id"]
        ranked = found.setdefault(prompt_id, RankedPrompt(prompt_id, row["prompt"]))
        for side in ("chosen", "rejected"):
            ranked.answers[row[f"{side}_id"]] = row[side]
        ranked.pairs.append((row["chosen_id"], row["rejected_id"], row["probability"]))
    return list(found.values())


def best_first(answers: int, pairs: Collection[Places]) -> list[int]:
    """Places from the best to the worst: by how many each beats less how many it loses to, directly
    or through others (Copeland 1951); equals stay in their order.

    Whatever beats another stands before it, unless the pairs go in a circle.
    """
    beats = set(pairs)
    for middle, first, last in itertools.product(range(answers), repeat=3):
        if (first, middle) in beats and (middle, last) in beats:
            beats.add((first, last))
    worth = Counter(better for better, _ in beats)
    worth.subtract(worse for _, worse in beats)
    return sorted(range(answers), key=lambda place: -worth[place])


def _tokenize(
    ranked: RankedPrompt,
    margin_of: Mapping[str, float],
    tokenizer: Any,
    ends: Collection[int],
    max_length: int,
) -> tuple[TokenList | None, str, str]:
    """The list, or why there is none: a reason that can be counted and its detail."""
    from jinja2 import TemplateError

    names = sorted(ranked.answers)
    try:
        told = render_together(
            ranked.prompt, [ranked.answers[name] for name in names], tokenizer, ends
        )
    except TemplateError as error:
        return None, "refused_by_template", str(error)
    if len(told.asked) >= max_length:
        return None, "prompt_too_long", f"{len(told.asked)} tokens"
    answers: list[list[int]] = []
    place_of: dict[str, int] = {}
    too_long: dict[str, int] = {}
    for name, answer in zip(names, told.answers, strict=True):
        if told.start + len(answer) > max_length:
            too_long[name] = told.start + len(answer)
            continue
        if answer not in answers:
            answers.append(answer)
        place_of[name] = answers.index(answer)
    pairs = [
        ((place_of[better], place_of[worse]), sure, margin_of.get(f"{better}>{worse}", 0.0))
        for better, worse, sure in ranked.pairs
        if better in place_of and worse in place_of and place_of[better] != place_of[worse]
    ]
    if not pairs:
        why = "answer_too_long" if too_long else "identical_answers"
        return None, why, f"{len(too_long)} of {len(names)} answers" if too_long else ""
    named = {place for places, _, _ in pairs for place in places}
    order = [n for n in best_first(len(answers), [p for p, _, _ in pairs]) if n in named]
    at = {place: rank for rank, place in enumerate(order)}
    kept = [answers[place] for place in order]
    return (
        TokenList(
            told.asked[: told.start],
            kept,
            [((at[b], at[w]), sure, margin) for (b, w), sure, margin in pairs],
            too_long,
            told.start < len(told.asked),
            any(not answer or answer[-1] not in ends for answer in kept),
        ),
        "",
        "",
    )


def _why_not_ranked(found: TokenList) -> str | None:
    from training.plackett_luce import Unrankable, stages

    try:
        stages(frozenset(places for places, _, _ in found.pairs))
    except Unrankable as error:
        return str(error)
    return None


def _dropped(ranked: RankedPrompt, record: str, reason: str, detail: str) -> Dropped:
    return Dropped("training", record, ranked.prompt_id, reason, detail)
