"""Judgments in, a posterior over the candidates' quality out.

Bradley–Terry with a Gaussian prior, fitted by Newton's method for many prompts at once:

    P(i beats j) = σ(θ_i - θ_j),   θ ~ N(0, PRIOR_VARIANCE),   posterior ≈ N(mode, Hessian⁻¹)

The prior keeps every group finite: a candidate that never lost has a high mean and a wide
variance, candidates that were never compared have the prior's, a group of ties is all equal.
A probability p counts as p wins and 1 - p losses, a tie as half of each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from judging.judge import Group
from preferences.records import Judgment, Ranking

PRIOR_VARIANCE = 2.0
"""Chosen so that one outright verdict gives P = 0.68, what one person's verdict is worth in
predicting another's (published agreement between people: 63-77 %)."""
TOLERANCE = 1e-10
MAX_STEPS = 100
LONGEST_STEP = 1.5
"""Newton on a log-logistic can overshoot where it is flat; this keeps it inside its basin."""

Array = npt.NDArray[np.float64]


def rank(groups: Sequence[Group], judgments: Iterable[Judgment]) -> Iterator[Ranking]:
    """One ranking for each group, in the order of the groups."""
    by_prompt: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        by_prompt[judgment.prompt_id].append(judgment)
    # Groups of one size are fitted together.
    by_size: dict[int, list[int]] = defaultdict(list)
    wins: list[Array] = []
    for number, group in enumerate(groups):
        wins.append(win_counts(group, by_prompt[group.prompt.prompt_id]))
        by_size[len(group.candidates)].append(number)
    means: dict[int, Array] = {}
    covariances: dict[int, Array] = {}
    for numbers in by_size.values():
        mean, covariance = fit(np.stack([wins[n] for n in numbers]))
        for place, number in enumerate(numbers):
            means[number], covariances[number] = mean[place], covariance[place]
    for number, group in enumerate(groups):
        yield Ranking(
            prompt_id=group.prompt.prompt_id,
            candidate_ids=tuple(c.candidate_id for c in group.candidates),
            mean=tuple(means[number].tolist()),
            covariance=tuple(covariances[number].ravel().tolist()),
            judgment_ids=tuple(j.judgment_id for j in by_prompt[group.prompt.prompt_id]),
        )


def win_counts(group: Group, judgments: Iterable[Judgment]) -> Array:
    """How often row beat column, shape (K, K); soft verdicts and ties count in parts."""
    place = {c.candidate_id: n for n, c in enumerate(group.candidates)}
    wins = np.zeros((len(place), len(place)))
    for first, second, probability in comparisons(judgments):
        if first in place and second in place:
            wins[place[first], place[second]] += probability
            wins[place[second], place[first]] += 1 - probability
    return wins


def comparisons(judgments: Iterable[Judgment]) -> Iterator[tuple[str, str, float]]:
    """Judgments as (one candidate, another, P(the one is better)). Failures say nothing."""
    single: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    soft = {"first": 1.0, "second": 0.0, "tie": 0.5}
    for judgment in judgments:
        if judgment.failure is not None:
            continue
        if judgment.scores is not None and len(judgment.candidate_ids) == 1:
            scored = (judgment.candidate_ids[0], judgment.scores[0])
            single[judgment.judge, judgment.kind].append(scored)
            continue
        first, second = judgment.candidate_ids
        if judgment.probability is not None:
            yield first, second, judgment.probability
        elif judgment.verdict is not None:
            yield first, second, soft[judgment.verdict]
        elif judgment.scores is not None:
            yield first, second, _outright(judgment.scores[0] - judgment.scores[1])
    for (_, kind), scored_ones in single.items():
        for (first, score), (second, other) in combinations(scored_ones, 2):
            # Only a reward model's scores are on the scale of log-odds.
            soft_score = kind == "reward_model"
            yield first, second, _sigmoid(score - other) if soft_score else _outright(score - other)


def fit(wins: Array) -> tuple[Array, Array]:
    """Posterior mean, shape (groups, K), and covariance, shape (groups, K, K), from win counts."""
    groups, size, _ = wins.shape
    games = wins + wins.transpose(0, 2, 1)
    theta = np.zeros((groups, size))
    identity = np.eye(size)
    for _ in range(MAX_STEPS):
        gradient, precision = _derivatives(wins, games, theta, identity)
        step = np.linalg.solve(precision, gradient[..., None])[..., 0]
        longest = np.abs(step).max(axis=1, keepdims=True)
        theta += step * np.minimum(1.0, LONGEST_STEP / np.maximum(longest, 1e-300))
        if longest.max(initial=0.0) < TOLERANCE:
            break
    _, precision = _derivatives(wins, games, theta, identity)
    return theta, np.asarray(np.linalg.inv(precision), dtype=np.float64)


def _derivatives(wins: Array, games: Array, theta: Array, identity: Array) -> tuple[Array, Array]:
    """Gradient of the log-posterior and minus its Hessian."""
    expected = 1 / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))
    gradient = (wins - games * expected).sum(axis=2) - theta / PRIOR_VARIANCE
    weight = games * expected * (1 - expected)
    diagonal = weight.sum(axis=2) + 1 / PRIOR_VARIANCE
    return gradient, diagonal[..., None] * identity - weight


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


def _outright(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)
