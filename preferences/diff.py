"""What changed between two preference datasets, pair by pair, by what the texts say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preferences.pair_table import Flags, PairTable, pair_table
from preferences.text_pairs import read_pairs

EXAMPLES = 5
"""Pairs that a change names."""
ROUNDING = 1e-6
"""Probabilities closer than this are the same."""


@dataclass(frozen=True, slots=True)
class Change:
    """One kind of change and how often it happened."""

    kind: str
    count: int
    examples: tuple[str, ...]
    """Ids of pairs: of the later dataset, or of the earlier for what was removed."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Two datasets side by side, the earlier first."""

    pairs: tuple[int, int]
    prompts: tuple[int, int]
    changes: tuple[Change, ...]
    """Every kind, those that did not happen too."""


def diff(before: str, after: str) -> Difference:
    """Compare two datasets; raises InputError if one cannot be read.

    Pairs are the same if their texts are, up to white space, whatever their ids. Both are read
    once; of each pair about a third of a kilobyte is in memory.
    """
    return difference(pair_table(read_pairs(before)), pair_table(read_pairs(after)))


def difference(before: PairTable, after: PairTable) -> Difference:
    """Compare two datasets that are read."""
    new = ~np.isin(after.pairs, before.pairs)
    gone = ~np.isin(before.pairs, after.pairs)
    # Flipped is what is gone in one direction and new in the other.
    flipped = new & np.isin(after.reversed_pairs, before.pairs[gone])
    removed = gone & ~np.isin(before.reversed_pairs, after.pairs[new])
    return Difference(
        pairs=(len(before), len(after)),
        prompts=(len(np.unique(before.prompt)), len(np.unique(after.prompt))),
        changes=(
            _prompts("prompts_added", after, ~np.isin(after.prompt, before.prompt)),
            _prompts("prompts_removed", before, ~np.isin(before.prompt, after.prompt)),
            _pairs("pairs_added", after, new & ~flipped),
            _pairs("pairs_removed", before, removed),
            _pairs("pairs_flipped", after, flipped),
            *_of_the_same(before, after),
        ),
    )


def _of_the_same(before: PairTable, after: PairTable) -> tuple[Change, Change, Change]:
    """What became of the pairs that are in both; of copies, the first is looked at."""
    both, ours, theirs = np.intersect1d(before.pairs, after.pairs, return_indices=True)
    old, new = before.probability[ours], after.probability[theirs]
    # A probability that came or went is a change as well, and the greatest.
    size = np.where(np.isnan(old) & np.isnan(new), 0, np.nan_to_num(np.abs(new - old), nan=1))
    changed = np.flatnonzero(size > ROUNDING)
    largest = changed[np.argsort(-size[changed], kind="stable")][:EXAMPLES]
    words = tuple(f"{after.ids[theirs[n]]}: {old[n]:.3f} to {new[n]:.3f}" for n in largest)
    old_side = np.array(before.split_names, object)[before.split[ours]]
    new_side = np.array(after.split_names, object)[after.split[theirs]]
    moved = np.flatnonzero(old_side != new_side)
    elsewhere = tuple(
        f"{after.ids[theirs[n]]}: {old_side[n]} to {new_side[n]}" for n in moved[:EXAMPLES]
    )
    return (
        Change("probability_changed", len(changed), words),
        Change("moved_to_another_split", len(moved), elsewhere),
        Change("unchanged", len(both) - len(np.union1d(changed, moved)), ()),
    )


def _pairs(kind: str, table: PairTable, rows: Flags) -> Change:
    places = np.flatnonzero(rows)
    return Change(kind, len(places), tuple(table.ids[n] for n in places[:EXAMPLES]))


def _prompts(kind: str, table: PairTable, rows: Flags) -> Change:
    """Counted once each; named by their first pairs."""
    places = np.flatnonzero(rows)
    first = np.sort(np.unique(table.prompt[places], return_index=True)[1])
    return Change(kind, len(first), tuple(table.ids[n] for n in places[first][:EXAMPLES]))
