"""How likely it is, by Plackett and Luce, that answers are ranked as their pairs say.

They are ranked by drawing the best of all, then the best of the rest, and so on, each with
probability softmax of the scores of those not yet ranked (Plackett 1975; Luce 1959). A whole
ranking has the probability of its draws. Pairs that leave two answers open, ties for instance, are
true of several rankings, and the probability is the sum over all of them: the likelihood of a
partial order (Liu et al. 2019, "Learning Plackett-Luce mixtures from partial preferences"), which
for ties is Cox regression's exact one (Kalbfleisch and Prentice 1973).

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import torch
from torch import Tensor

MOST_STAGES = 1 << 10
"""Sets of answers that can be left to rank, at most: a whole ranking of K has K − 1, and answers of
which any may come first have up to 2^K."""

Pair = tuple[int, int]
"""Places of two answers, the better one first."""
Stage = tuple[tuple[int, ...], tuple[tuple[int, frozenset[int]], ...]]
"""The answers left to rank; and each that may come next, with those that are then left."""


class Unrankable(ValueError):
    """No ranking agrees with the pairs, or too many do."""


def plackett_luce_loss(scores: Tensor, pairs: Collection[Pair]) -> Tensor:
    """−log P(all pairs come out as they say), in nats, of the scores of one prompt's answers, (K,).

    Of a whole ranking, the best first, it is −Σ_k [s_k − log Σ_{j ≥ k} exp s_j] (Rafailov et al.
    2023, eq. 20, with s = β·log π/π_ref); of a single pair it is −log σ(s_better − s_worse).
    Raises Unrankable where there is no such ranking.
    """
    chances: dict[frozenset[int], Tensor] = {frozenset(): scores.new_zeros(())}
    left: frozenset[int] = frozenset()
    for rest, nexts in stages(frozenset(pairs)):
        drawn = scores[[place for place, _ in nexts]]
        after = torch.stack([chances[others] for _, others in nexts])
        left = frozenset(rest)
        chances[left] = torch.logsumexp(drawn + after, 0) - torch.logsumexp(scores[[*rest]], 0)
    return -chances[left]


@lru_cache(maxsize=1 << 12)  # lists of a dataset are mostly of few kinds
def stages(pairs: frozenset[Pair]) -> tuple[Stage, ...]:
    """The sets of answers that can be left while they are ranked, each behind what it leads to.

    An answer that no pair of those left names can come anywhere and is left out: whatever there
    is besides, others are ranked among themselves by the same draws.
    """
    found: dict[frozenset[int], Stage] = {}

    def visit(among: frozenset[Pair]) -> frozenset[int]:
        rest = frozenset(place for pair in among for place in pair)
        if rest and rest not in found:
            first = sorted(rest - {worse for _, worse in among})
            if not first:
                raise Unrankable("the pairs go in a circle")
            nexts = tuple((n, visit(frozenset(p for p in among if n not in p))) for n in first)
            if len(found) == MOST_STAGES:
                raise Unrankable("the pairs leave too much open")
            found[rest] = tuple(sorted(rest)), nexts
        return rest

    visit(pairs)
    return tuple(found.values())
