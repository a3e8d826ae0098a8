"""The pairs of a dataset as columns of numbers, by which a million of them are compared at once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preferences.text_pairs import TextPair

Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Flags = NDArray[np.bool_]

TEXTS = ("prompt", "chosen", "rejected")
REFUSALS = (
    *("i can't", "i cannot", "i can not", "i won't", "i will not", "i must decline"),
    *("i'm unable", "i am unable", "i'm not able", "i am not able", "as an ai"),
    *("i'm sorry, but", "i am sorry, but", "sorry, but i", "sorry, i can"),
    *("i apologize, but", "i apologise, but"),
)
"""What refusals open with. It finds the plain ones, and now and then an answer that is none."""
OPENING = 200
"""Characters of an answer in which these words make it a refusal."""


@dataclass(frozen=True)
class PairTable:
    """A row a pair, in about 70 bytes and its id. Texts are hashes, equal up to white space.

    Hashes have 64 bits and mean something in this process only. Among a million texts, two
    different ones have the same with probability 3·10⁻⁸.
    """

    ids: list[str]
    split_names: tuple[str, ...]
    split: Integers
    """Places in `split_names`."""
    category_names: tuple[str, ...]
    category: Integers
    """Places in `category_names`; -1 where a prompt has none."""
    prompt: Hashes
    chosen: Hashes
    rejected: Hashes
    prompt_length: Integers
    """Characters without the white space at both ends."""
    chosen_length: Integers
    rejected_length: Integers
    chosen_refuses: Flags
    rejected_refuses: Flags
    probability: NDArray[np.float64]
    """NaN where the dataset has none."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pairs(self) -> Hashes:
        """A hash of prompt, chosen and rejected."""
        return _joined(self.prompt, self.chosen, self.rejected)

    @property
    def reversed_pairs(self) -> Hashes:
        """The hash each pair would have were it labelled the other way round."""
        return _joined(self.prompt, self.rejected, self.chosen)


def pair_table(pairs: Iterable[TextPair]) -> PairTable:
    """Read pairs once, into columns."""
    ids: list[str] = []
    splits: dict[str, int] = {}
    categories: dict[str, int] = {}
    integers = {name: array("q") for name in ("split", "category", *(f"{t}_length" for t in TEXTS))}
    hashes = {name: array("Q") for name in TEXTS}
    refusals = {name: array("b") for name in ("chosen", "rejected")}
    probabilities = array("d")
    for pair in pairs:
        ids.append(pair.pair_id)
        integers["split"].append(splits.setdefault(pair.split, len(splits)))
        integers["category"].append(
            -1 if pair.category is None else categories.setdefault(pair.category, len(categories))
        )
        for name, text in zip(TEXTS, (pair.prompt, pair.chosen, pair.rejected), strict=True):
            hashes[name].append(text_hash(text))
            integers[f"{name}_length"].append(len(text.strip()))
        refusals["chosen"].append(refuses(pair.chosen))
        refusals["rejected"].append(refuses(pair.rejected))
        probabilities.append(np.nan if pair.probability is None else pair.probability)
    columns: dict[str, Any] = {
        **{name: np.array(column, np.int64) for name, column in integers.items()},
        **{name: np.array(column, np.uint64) for name, column in hashes.items()},
        **{f"{name}_refuses": np.array(flags, bool) for name, flags in refusals.items()},
        "probability": np.array(probabilities, np.float64),
    }
    return PairTable(
        ids=ids, split_names=tuple(splits), category_names=tuple(categories), **columns
    )


def text_hash(text: str) -> int:
    """The same for texts that differ in white space only."""
    return hash(" ".join(text.split())) % 2**64


def refuses(answer: str) -> bool:
    """Whether the answer opens with words of a refusal."""
    opening = answer[:OPENING].lower().replace("’", "'")
    return any(words in opening for words in REFUSALS)


def _joined(prompt: Hashes, first: Hashes, second: Hashes) -> Hashes:
    # Any odd factors will do: the hashes are random already, the sum wraps around at 2⁶⁴.
    factors = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
    joined: Hashes = prompt + factors[0] * first + factors[1] * second
    return joined
