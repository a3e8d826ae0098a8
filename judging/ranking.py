"""Judgments in, a posterior over the candidates' quality out, by the noise model of `noise`."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations

import numpy as np

from judging.calibration import Calibration, Families
from judging.calls import columns
from judging.fitted_noise import fit_noise
from judging.judge import Group
from judging.noise import Array, Belief, Noise, posterior
from judging.raters import is_human, opinions
from preferences.records import Judgment, Ranking

DRAWS = 512
"""Of the posterior, for what has no closed form: a probability is off by at most about 0.02."""


def rank(
    groups: Sequence[Group],
    judgments: Iterable[Judgment],
    noise: Noise | None = None,
    calibration: Calibration | None = None,
    families: Families | None = None,
) -> Iterator[Ranking]:
    """One ranking for each group, in the order of the groups.

    With a calibration, what the judges say is first brought to people's scale, and what people say
    of these very candidates is added to that. Without one, people count as judges.
    """
    by_prompt = _by_prompt(judgments)
    if calibration is None:
        yield from _ranked(groups, by_prompt, noise or Noise())
        return
    judges = {p: [j for j in said if not is_human(j)] for p, said in by_prompt.items()}
    people = {p: [j for j in said if is_human(j)] for p, said in by_prompt.items()}
    beliefs = {
        ranking.prompt_id: (
            calibration.mean(ranking, group.candidates, families or Families()),
            calibration.covariance(ranking),
        )
        for group, ranking in zip(groups, _ranked(groups, judges, noise or Noise()), strict=True)
    }
    for ranking in _ranked(groups, people, Noise(), beliefs):
        said = by_prompt[ranking.prompt_id]
        yield dataclasses.replace(ranking, judgment_ids=tuple(j.judgment_id for j in said))


def _ranked(
    groups: Sequence[Group],
    by_prompt: Mapping[str, Sequence[Judgment]],
    noise: Noise,
    beliefs: Mapping[str, tuple[Array, Array]] | None = None,
) -> Iterator[Ranking]:
    means: dict[int, list[float]] = {}
    covariances: dict[int, list[float]] = {}
    for numbers, calls in columns(groups, by_prompt):
        belief = None
        if beliefs is not None:
            of = [beliefs[groups[number].prompt.prompt_id] for number in numbers]
            precision: Array = np.linalg.inv(np.stack([covariance for _, covariance in of]))
            belief = Belief(np.stack([mean for mean, _ in of]), precision)
        found = posterior(calls, noise, belief)
        for place, number in enumerate(numbers):
            # Rounded, so that what else was ranked at the same time leaves no trace in last digits.
            means[number] = found.mean[place].round(12).tolist()
            covariances[number] = found.covariance[place].ravel().round(12).tolist()
    for number, group in enumerate(groups):
        yield Ranking(
            prompt_id=group.prompt.prompt_id,
            candidate_ids=tuple(c.candidate_id for c in group.candidates),
            mean=tuple(means[number]),
            covariance=tuple(covariances[number]),
            judgment_ids=tuple(j.judgment_id for j in by_prompt.get(group.prompt.prompt_id, ())),
        )


def learn_noise(groups: Sequence[Group], judgments: Iterable[Judgment]) -> Noise:
    """How the judges of these groups err; a thousand prompts are plenty."""
    return fit_noise([calls for _, calls in columns(groups, _by_prompt(judgments))])


def _by_prompt(judgments: Iterable[Judgment]) -> dict[str, list[Judgment]]:
    by_prompt: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        by_prompt[judgment.prompt_id].append(judgment)
    return by_prompt


def comparisons(judgments: Iterable[Judgment]) -> Iterator[tuple[str, str, float]]:
    """Judgments as (one candidate, another, P(the one is better)). Failures say nothing."""
    scored: dict[str, list[tuple[str, float]]] = defaultdict(list)
    others = []
    for judgment in judgments:
        if judgment.kind != "reward_model":
            others.append(judgment)
        elif judgment.scores is not None:
            scored[judgment.judge].append((judgment.candidate_ids[0], judgment.scores[0]))
    for opinion in opinions(others):
        yield opinion.first, opinion.second, opinion.leaning
    # Only a reward model's scores are on the scale of log-odds.
    for of_one in scored.values():
        for (first, score), (second, other) in combinations(of_one, 2):
            yield first, second, _sigmoid(score - other)


def win_probability(ranking: Ranking, one: int, other: int) -> float:
    """P(candidate `one` beats candidate `other`), uncertainty of the fit included.

    The mean of σ over a Gaussian, by MacKay's approximation σ(m / √(1 + π s² / 8)) (MacKay 1992,
    "The evidence framework applied to classification networks", eq. 10).
    """
    size = len(ranking.candidate_ids)
    covariance = ranking.covariance
    variance = (
        covariance[one * size + one]
        + covariance[other * size + other]
        - 2 * covariance[one * size + other]
    )
    mean = ranking.mean[one] - ranking.mean[other]
    return _sigmoid(mean / math.sqrt(1 + math.pi * max(variance, 0.0) / 8))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


def best_probabilities(mean: Array, covariance: Array) -> Array:
    """P(each candidate is the best), for groups of one size: shapes (G, K) and (G, K, K)."""
    drawn = _drawn(mean, covariance)
    best = drawn.argmax(axis=2)
    shares: Array = (best[:, :, None] == np.arange(mean.shape[1])).mean(axis=1)
    return shares


def expected_regret(mean: Array, covariance: Array) -> Array:
    """By how much, in logits, the best candidate is expected to beat the one held for the best."""
    drawn = _drawn(mean, covariance)
    chosen = np.take_along_axis(drawn, mean.argmax(axis=1)[:, None, None], axis=2)[:, :, 0]
    regret: Array = (drawn.max(axis=2) - chosen).mean(axis=1)
    return regret


def _drawn(mean: Array, covariance: Array) -> Array:
    """The same standard draws for every group, so that a group's numbers are its own."""
    root = np.linalg.cholesky(covariance)
    drawn: Array = mean[:, None, :] + np.einsum("dk,gjk->gdj", _standard(mean.shape[1]), root)
    return drawn


@cache
def _standard(size: int) -> Array:
    half = np.random.default_rng(0).standard_normal((DRAWS // 2, size))
    return np.concatenate([half, -half])
