"""Which comparisons to ask for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from judging.judge import Comparison, Group


def all_pairs_both_orders(group: Group) -> Iterator[Comparison]:
    """Every pair of a group in both orders: K·(K-1) comparisons for K candidates.

    Asking in both orders is what lets a judge's liking for the first place cancel out.
    """
    for first, second in combinations(group.candidates, 2):
        comparison = Comparison(group.prompt, first, second)
        yield comparison
        yield comparison.swap()
