"""How much of the prompts of one split stands in those of another, by runs of words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from preferences.pair_table import Integers, text_hash
from preferences.text_pairs import TextPair

RUN_WORDS = 8
"""Words in a run; a shorter prompt is one run."""


def overlaps(
    held_out: Iterable[TextPair], train: Iterable[TextPair], left_out: Collection[int] = ()
) -> dict[str, float]:
    """For each held-out prompt, the share of its runs that stand in any training prompt.

    By the id of the first pair of the prompt. Prompts whose hash is in `left_out` and those without
    words are not looked at. The runs of the held-out prompts are in memory, those of the training
    prompts pass by.
    """
    names, runs = [], []
    for pair in _each_prompt(held_out):
        of_prompt = _run_hashes(pair.prompt)
        if len(of_prompt) and text_hash(pair.prompt) not in left_out:
            names.append(pair.pair_id)
            runs.append(of_prompt)
    if not runs:
        return {}
    known, places = np.unique(np.concatenate(runs), return_inverse=True)
    seen = np.zeros(len(known))
    for pair in _each_prompt(train):
        of_prompt = _run_hashes(pair.prompt)
        at = np.minimum(np.searchsorted(known, of_prompt), len(known) - 1)
        seen[at[known[at] == of_prompt]] = 1
    sizes = np.array([len(of_prompt) for of_prompt in runs])
    shares = np.add.reduceat(seen[places], np.cumsum(sizes) - sizes) / sizes
    return dict(zip(names, shares.tolist(), strict=True))


def _each_prompt(pairs: Iterable[TextPair]) -> Iterator[TextPair]:
    """One pair of each prompt, the first."""
    seen: set[int] = set()
    for pair in pairs:
        identity = text_hash(pair.prompt)
        if identity not in seen:
            seen.add(identity)
            yield pair


def _run_hashes(text: str) -> Integers:
    words = re.findall(r"\w+", text.lower())
    starts = range(max(len(words) - RUN_WORDS, 0) + 1 if words else 0)
    return np.array([hash(tuple(words[n : n + RUN_WORDS])) for n in starts], np.int64)
