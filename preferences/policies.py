"""Pair policies: which answers of a prompt are worth learning from, side by side.

A policy is a function from the standings of one prompt to the pairs it proposes, each as two places
in the standings, the answer to prefer first. `assembly` then drops those that are too unsure, cut
short or too alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from statistics import fmean, pstdev
from typing import Literal, Self

from pydantic import Field, model_validator

from preferences.config import Config
from preferences.records import Candidate, Ranking


class PairsConfig(Config):
    """Which candidates of a prompt become chosen and rejected."""

    policy: Literal[
        "best_worst",
        "best_random",
        "all_pairs",
        "top_two",
        "max_min",
        "two_sigma",
        "length_matched",
        "delta",
    ] = "best_worst"
    """The best candidate is the one with the highest mean. `best_worst`: it against the lowest;
    `best_random`: against any other, drawn by the prompt's id; `all_pairs`: every pair; `top_two`:
    against the second; `max_min`: against the lowest that it surely beats; `two_sigma`: against the
    one nearest to two standard deviations below the mean; `length_matched`: of all sure pairs the
    one whose lengths are most alike; `delta`: every answer of a stronger model against every one
    of a weaker, in the order of `models`."""
    models: tuple[str, ...] = ()
    """For `delta`: names of models, strong before weak. Answers by others are not paired."""
    min_probability: float = Field(0.6, ge=0.5, le=1)
    """Smallest P(chosen beats rejected) that is kept."""
    max_similarity: float = Field(0.95, gt=0, le=1)
    """Answers at least this alike (1 - normalised edit distance) are never paired."""

    @model_validator(mode="after")
    def _models_are_for_delta(self) -> Self:
        if self.policy == "delta" and len(set(self.models)) < 2:
            raise ValueError("delta needs two `models` or more, strong before weak; name them")
        if self.policy != "delta" and self.models:
            raise ValueError(f"{self.policy} looks at no `models`; remove them or take delta")
        if len(set(self.models)) < len(self.models):
            raise ValueError("a model stands twice in `models`; name each once")
        return self


@dataclass(frozen=True, slots=True)
class Standings:
    """The candidates of one prompt, two or more, from the best to the worst by their means."""

    prompt_id: str
    candidates: Sequence[Candidate]
    """Equals stand in the order of their ids."""
    means: Sequence[float]
    """Their quality in logits, falling."""
    probability: Callable[[int, int], float]
    """P(the candidate at one place beats the one at another)."""


Places = tuple[int, int]
"""Places in the standings: the answer to prefer, and the other."""
PairPolicy = Callable[[Standings, PairsConfig], Iterator[Places]]


def by_mean(ranking: Ranking) -> list[int]:
    """Places in the ranking from the best to the worst; equals stand in the order of their ids."""
    return sorted(
        range(len(ranking.mean)), key=lambda n: (-ranking.mean[n], ranking.candidate_ids[n])
    )


def best_worst(standings: Standings, config: PairsConfig) -> Iterator[Places]:
    """The candidate with the highest mean against the one with the lowest."""
    yield 0, len(standings.candidates) - 1


def best_random(standings: Standings, config: PairsConfig) -> Iterator[Places]:
    """The best against one of the others. The draw depends on the prompt's id alone."""
    yield 0, Random(standings.prompt_id).choice(range(1, len(standings.candidates)))


def all_pairs(standings: Standings, config: PairsConfig) -> Iterator[Places]:
    """Every pair, the better first."""
    yield from combinations(range(len(standings.candidates)), 2)


def top_two(standings: Standings, config: PairsConfig) -> Iterator[Places]:
    """The best against the second best: the hardest pair, and often too unsure to be kept."""
    yield 0, 1


def max_min(standings: Standings, config: PairsConfig) -> Iterator[Places]:
    """The best against the lowest mean among those it beats with `min_probability` or more.

    Unlike `best_worst` it does not give a prompt up because the lowest is little known.
    """
    for lowest in range(len(standings.candidates) - 1, 0, -1):
        if standings.probability(0, lowest) >= config.min_probability:
            yield 0, lowest
            return


def two_sigma(standings: Standings, config: PairsConfig) -> Iterator[Places]:
    """The best against the one whose mean is nearest to μ − 2σ of the prompt's means.

    With many samples the very worst is an outlier that teaches little (Xiao et al. 2025, "Finding
    the sweet spot", arXiv 2502.16825). No value lies further below the mean than σ·√(K − 1)
    (Samuelson 1968), so with five candidates or fewer this is `best_worst`.
    """
    means = standings.means
    target = fmean(means) - 2 * pstdev(means)
    yield 0, min(range(len(means) - 1, 0, -1), key=lambda n: abs(means[n] - target))


def length_matched(standings: Standings, config: PairsConfig) -> Iterator[Places]:
    """Of the pairs with `min_probability` or more, the one whose lengths are most alike.

    Least |log(length ratio)| in characters; of equals, the one with the better answers.
    """
    sure = [
        pair
        for pair in all_pairs(standings, config)
        if standings.probability(*pair) >= config.min_probability
    ]
    logs = [math.log(max(len(c.response), 1)) for c in standings.candidates]
    if sure:
        yield min(sure, key=lambda pair: abs(logs[pair[0]] - logs[pair[1]]))


def delta(standings: Standings, config: PairsConfig) -> Iterator[Places]:
    """Every answer of a stronger model against every answer of a weaker one.

    The order of models decides who is preferred, not the ranking: what is learnt is the difference
    between them (Geng et al. 2025, "The delta learning hypothesis", arXiv 2507.06187). Pairs of
    which the judges say otherwise come out less probable than `min_probability`, and are dropped.
    """
    strength = {model: place for place, model in enumerate(config.models)}
    ranks = [strength.get(c.model) for c in standings.candidates]
    for one, other in all_pairs(standings, config):
        first, second = ranks[one], ranks[other]
        if first is None or second is None or first == second:
            continue
        yield (one, other) if first < second else (other, one)


POLICIES: dict[str, PairPolicy] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "all_pairs": all_pairs,
    "top_two": top_two,
    "max_min": max_min,
    "two_sigma": two_sigma,
    "length_matched": length_matched,
    "delta": delta,
}
