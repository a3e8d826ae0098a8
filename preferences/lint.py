"""What to look at before training on a preference dataset: one rule, one function.

A rule is a function from the table of all pairs to a finding, or to None where there is nothing to
say. An error is a pair that cannot be right; a warning is something a model can learn in the place
of quality; the rest informs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Literal

import numpy as np

from preferences.errors import InputError
from preferences.overlap import RUN_WORDS, overlaps
from preferences.pair_table import Flags, Integers, PairTable, pair_table
from preferences.telling import area_under_curve, share_of
from preferences.text_pairs import read_pairs

Level = Literal["error", "warning", "info"]

EXAMPLES = 5
"""Pairs that a finding names."""
RARE = 0.05
"""Refusals decide too few pairs to warn of, if they decide less than this share."""
SHOWN = 12
"""Categories that are named."""
NEAR = 0.5
"""A held-out prompt is no new one if this share of its runs of words stands in training prompts."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule has to say of a dataset."""

    level: Level
    rule: str
    count: int
    """Pairs it concerns, or prompts where `detail` speaks of prompts."""
    detail: str
    """What was found, in words and figures."""
    cure: str = ""
    examples: tuple[str, ...] = ()
    """Ids of some of the pairs."""


def lint(dataset: str, max_characters: int | None = None) -> list[Finding]:
    """Everything the rules find, errors first; raises InputError if it holds no pairs.

    `max_characters` limits prompt and longer answer together. The dataset is read once, and once
    more if it has a split beside `train`; of each pair about half a kilobyte is in memory.
    """
    table = pair_table(read_pairs(dataset))
    if not len(table):
        raise InputError(f"{dataset}: holds no pairs; build it or name another")
    found = [rule(table) for rule in RULES]
    if max_characters is not None:
        found.append(too_long(table, max_characters))
    if "train" in table.split_names:
        others = [name for name in table.split_names if name != "train"]
        held_out = (pair for name in others for pair in read_pairs(dataset, name))
        trained = table.prompt[table.split == table.split_names.index("train")]
        shares = overlaps(held_out, read_pairs(dataset, "train"), set(trained.tolist()))
        found.append(near_duplicate_prompts(shares))
    return sorted((f for f in found if f is not None), key=lambda f: LEVELS.index(f.level))


LEVELS: tuple[Level, ...] = ("error", "warning", "info")


# Errors


def empty_texts(table: PairTable) -> Finding | None:
    """A prompt or an answer that says nothing."""
    empty = (table.prompt_length == 0) | (table.chosen_length == 0) | (table.rejected_length == 0)
    return _of(table, empty, "error", "empty_texts", "a text is empty", "remove them")


def equal_answers(table: PairTable) -> Finding | None:
    """An answer preferred to itself."""
    equal = (table.chosen == table.rejected) & (table.chosen_length > 0)
    detail = "chosen and rejected are the same up to white space"
    return _of(table, equal, "error", "equal_answers", detail, "remove them: they teach nothing")


def contradictory_pairs(table: PairTable) -> Finding | None:
    """The same two answers, each preferred to the other."""
    both = np.isin(table.pairs, table.reversed_pairs) & (table.chosen != table.rejected)
    detail = "the dataset also holds the same pair the other way round"
    cure = "judge them again, or keep one with its probability and train with soft labels"
    return _of(table, both, "error", "contradictory_pairs", detail, cure)


def impossible_probabilities(table: PairTable) -> Finding | None:
    """A label that its own probability speaks against."""
    given = ~np.isnan(table.probability)
    wrong = given & ~((table.probability >= 0.5) & (table.probability <= 1))
    detail = "P(chosen beats rejected) is not between 0.5 and 1"
    cure = "exchange chosen and rejected, or mend the column"
    return _of(table, wrong, "error", "impossible_probabilities", detail, cure)


def prompts_in_two_splits(table: PairTable) -> Finding | None:
    """What is held out must not be trained on."""
    codes = range(len(table.split_names))
    sides = [np.unique(table.prompt[table.split == code]) for code in codes]
    prompts, splits = np.unique(np.concatenate(sides), return_counts=True)
    shared = prompts[splits > 1]
    rows = np.isin(table.prompt, shared)
    if "train" in table.split_names:
        rows &= table.split != table.split_names.index("train")
    detail = f"prompts stand in more than one of the splits {', '.join(table.split_names)}"
    cure = "split by prompt"
    return _of(table, rows, "error", "prompts_in_two_splits", detail, cure, count=len(shared))


# Warnings


def duplicate_pairs(table: PairTable) -> Finding | None:
    """A pair that was there before counts double in training."""
    again = np.ones(len(table), bool)
    again[np.unique(table.pairs, return_index=True)[1]] = False
    detail = "the same prompt, chosen and rejected came before"
    return _of(table, again, "warning", "duplicate_pairs", detail, "remove the copies")


def circular_pairs(table: PairTable) -> Finding | None:
    """Three answers or more, each preferred to the next and the last to the first."""
    rows = np.flatnonzero(~np.isin(table.pairs, table.reversed_pairs))
    rows = rows[np.argsort(table.prompt[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(table.prompt[rows])) + 1
    circles = np.zeros(len(table), bool)
    for group in np.split(rows, cuts):
        if len(group) > 2 and (row := _row_in_a_circle(table, group)) is not None:
            circles[row] = True
    detail = "prompts have pairs that go in a circle, so no order of the answers agrees with all"
    cure = "pair from rankings, or train with soft labels"
    return _of(table, circles, "warning", "circular_pairs", detail, cure)


def length(table: PairTable) -> Finding | None:
    """How well length alone tells which answer was chosen."""
    chosen, rejected = table.chosen_length, table.rejected_length
    wins = float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))
    share = share_of(wins, len(np.unique(table.prompt)))
    detail = (
        f"the chosen answer is the longer one in {share} of the pairs, a tie counting half; "
        f"the AUC of length for the label is {area_under_curve(chosen, rejected):.3f}"
    )
    if share.tells:
        cure = "pair with `policy: length_matched`, and compare models at equal length"
        return Finding("warning", "length", len(table), detail, cure)
    return Finding("info", "length", len(table), detail)


def refusals(table: PairTable) -> Finding | None:
    """How often answers refuse, and whether refusing alone tells which was chosen."""
    one = table.chosen_refuses != table.rejected_refuses
    count = int(one.sum())
    detail = (
        f"{table.chosen_refuses.mean():.1%} of the chosen and {table.rejected_refuses.mean():.1%} "
        "of the rejected answers open like a refusal"
    )
    if not count:
        return Finding("info", "refusals", count, detail)
    share = share_of(float(table.chosen_refuses[one].mean()), len(np.unique(table.prompt[one])))
    detail += f"; where one of two does, it is chosen in {share}"
    if share.tells and count >= RARE * len(table):
        learnt = "to refuse" if share.mean > 0.5 else "never to refuse"
        cure = f"a model learns {learnt}: add prompts where the other is right"
        examples = _ids(table, np.flatnonzero(one))
        return Finding("warning", "refusals", count, detail, cure, examples)
    return Finding("info", "refusals", count, detail)


def too_long(table: PairTable, limit: int) -> Finding | None:
    """Pairs that training would drop or cut."""
    lengths = table.prompt_length + np.maximum(table.chosen_length, table.rejected_length)
    detail = (
        f"prompt and longer answer have {lengths.max():,} characters at most, and not {limit:,}"
    )
    cure = "raise the trainer's limit, or ask for shorter answers"
    return _of(table, lengths > limit, "warning", "too_long", detail, cure)


def near_duplicate_prompts(shares: Mapping[str, float]) -> Finding | None:
    """Held-out prompts of which much stands in training prompts too; equal ones are left out."""
    near = [name for name, share in shares.items() if share >= NEAR]
    if not near:
        return None
    detail = (
        f"of {len(shares):,} held-out prompts these share half or more of their runs of "
        f"{RUN_WORDS} words with training prompts"
    )
    cure = "remove near duplicates before the split: `prompts.near_duplicates`"
    examples = tuple(near[:EXAMPLES])
    return Finding("warning", "near_duplicate_prompts", len(near), detail, cure, examples)


# Figures


def probabilities(table: PairTable) -> Finding | None:
    """How sure the labels are."""
    given = table.probability[~np.isnan(table.probability)]
    if not len(given):
        return Finding("info", "probabilities", 0, "no pair has a probability: all labels are hard")
    counts = np.histogram(given, np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]))[0]
    bins = ("0.5 to 0.6", "to 0.7", "to 0.8", "to 0.9", "to 1")
    parts = (f"{name} {count / len(given):.0%}" for name, count in zip(bins, counts, strict=True))
    detail = f"mean {given.mean():.3f}; {', '.join(parts)}"
    return Finding("info", "probabilities", len(given), detail)


def splits(table: PairTable) -> Finding | None:
    """Pairs and prompts of each split."""
    parts = []
    for code, name in enumerate(table.split_names):
        prompts = table.prompt[table.split == code]
        parts.append(f"{name} {len(prompts):,} pairs of {len(np.unique(prompts)):,} prompts")
    return Finding("info", "splits", len(table), ", ".join(parts))


def categories(table: PairTable) -> Finding | None:
    """Prompts of each category, the largest first."""
    if not table.category_names:
        return None
    _, first = np.unique(table.prompt, return_index=True)
    found = table.category[first]
    counts = np.bincount(found[found >= 0], minlength=len(table.category_names))
    order = np.argsort(-counts, kind="stable")
    parts = [f"{table.category_names[n]} {counts[n]:,}" for n in order[:SHOWN]]
    if len(order) > SHOWN:
        parts.append(f"and {len(order) - SHOWN} more")
    return Finding("info", "categories", len(first), f"prompts: {', '.join(parts)}")


Rule = Callable[[PairTable], Finding | None]
RULES: tuple[Rule, ...] = (
    empty_texts,
    equal_answers,
    contradictory_pairs,
    impossible_probabilities,
    prompts_in_two_splits,
    duplicate_pairs,
    circular_pairs,
    length,
    refusals,
    splits,
    probabilities,
    categories,
)


def _of(
    table: PairTable,
    rows: Flags,
    level: Level,
    rule: str,
    detail: str,
    cure: str,
    count: int | None = None,
) -> Finding | None:
    """A finding on some rows, or None where there are none."""
    places = np.flatnonzero(rows)
    if not len(places):
        return None
    count = len(places) if count is None else count
    return Finding(level, rule, count, detail, cure, _ids(table, places))


def _ids(table: PairTable, places: Integers) -> tuple[str, ...]:
    return tuple(table.ids[place] for place in places[:EXAMPLES])


def _row_in_a_circle(table: PairTable, rows: Integers) -> int | None:
    """One of the pairs that form a circle; None where the pairs agree with an order."""
    edges = zip(table.chosen[rows].tolist(), table.rejected[rows].tolist(), strict=True)
    places = dict(zip(edges, rows.tolist(), strict=True))
    graph = TopologicalSorter[int]()
    for chosen, rejected in places:
        graph.add(rejected, chosen)
    try:
        graph.prepare()
    except CycleError as error:
        one, next_one = error.args[1][:2]
        place: int = places[one, next_one]
        return place
    return None
