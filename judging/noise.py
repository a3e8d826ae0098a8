"""How judges err, and what their verdicts say of the candidates all the same.

Candidate i of a prompt has a quality θ_i ~ N(0, v), in logits. A pair (i, k) of it looks like

    η_ik = θ_i - θ_k + u_ik,   u_ik ~ N(0, τ²)

to everybody: u is what all judges and both orders have in common, so asking about a pair again and
again never makes it certain. Judge j, shown i first, gives

    a log-odds    y = κ_j η_ik + b_j + ε,   ε ~ N(0, s_j²)          where its probability is read,
    a verdict     i : k : tie  =  e^(x/2) : e^(-x/2) : e^λ_j,  x = κ_j η_ik + b_j    where words are

(the second is Davidson 1970 with an order effect, Davidson & Beaver 1977). κ is how strongly the
judge speaks, b how much it likes the first place. Judges tell θ up to a factor; v is held where one
person's verdict is worth what it is in predicting another's, so that θ is in people's unit.
`posterior` finds θ for known noise, for many prompts at once; `fitted_noise` has the noise itself.
Log-odds alone are one linear solve; verdicts take a few Newton steps, with u eliminated pair by
pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

TOLERANCE = 1e-10
MAX_STEPS = 100
LONGEST_STEP = 1.5
"""Newton on a log-logistic can overshoot where it is flat; this keeps it inside its basin."""


@dataclass(frozen=True)
class JudgeNoise:
    """How one judge's answers come from what there is to see."""

    scale: float = 1.0
    """κ: log-odds of the judge's for one of quality, or units of its scores."""
    bias: float = 0.0
    """b: log-odds in favour of what is shown first."""
    variance: float = 1.0
    """s²: of the log-odds around what the judge says on average. Not used for verdicts."""
    tie: float = -2.0
    """λ: log-weight of a tie. Not used for log-odds."""


@dataclass(frozen=True)
class Noise:
    """The noise of all judges, and how far candidates differ."""

    judges: Mapping[str, JudgeNoise] = field(default_factory=dict)
    """By name; a judge that is not here has the default."""
    pair_variance: float = 0.05
    """τ²: what repeated and other judges' calls about a pair have in common."""
    quality_variance: float = 2.0
    """v, which is not fitted. With the other defaults one outright verdict gives P = 0.68, what one
    person's verdict is worth in predicting another's (published agreement: 63-77 %)."""

    def of(self, judge: str) -> JudgeNoise:
        """The judge's noise, or the default."""
        return self.judges.get(judge, JudgeNoise())


@dataclass(frozen=True)
class Calls:
    """What was said about `groups` groups of `size` candidates, as columns of one row a call."""

    groups: int
    size: int
    cell: Integers
    """Which pair of which group: group · pairs + pair, pairs in the order of `pairs(size)`."""
    sign: Array
    """1 where the pair's first candidate was shown first, -1 where its second was."""
    judge: Integers
    """Place in `judges`."""
    value: Array
    """Log-odds for the first shown; for verdicts 1, -1, or 0 for a tie."""
    is_soft: Booleans
    """Whether `value` is log-odds."""
    has_order: Booleans
    """Whether the judge saw one before the other, so that its bias matters."""
    weight: Array
    """What a call counts: 1; less for what K answers scored or ordered at once say of all
    their K(K-1)/2 pairs, which is not as much as so many calls: 1/K for differences of scores,
    since K scores about their mean are worth Σ (d_ik)² / K, and 2/K for verdicts, so K - 1."""
    freedom: Array
    """How many independent numbers a call is: 1, and 2/K for each pair of what was scored or
    ordered at once."""
    judges: tuple[str, ...]


@dataclass(frozen=True)
class Posterior:
    """What is known of the candidates of groups of one size, and of every pair of theirs."""

    mean: Array
    """Of θ, shape (groups, K)."""
    covariance: Array
    """Of θ, shape (groups, K, K)."""
    pair_mean: Array
    """Of η, shape (groups · pairs)."""
    pair_variance: Array
    """Of η."""
    common: Array
    """E[u²], shape (groups · pairs)."""
    share: Array
    """How much of what is left of η once θ is known the calls have settled, from 0 to 1."""


@dataclass(frozen=True)
class Belief:
    """What is taken to be known of the candidates before the calls: N(mean, precision⁻¹)."""

    mean: Array
    """Shape (groups, K)."""
    precision: Array
    """Shape (groups, K, K)."""


def pairs(size: int) -> tuple[Integers, Integers]:
    """The first and the second candidate of every pair of a group."""
    first, second = np.triu_indices(size, 1)
    return first.astype(np.int64), second.astype(np.int64)


def posterior(calls: Calls, noise: Noise, belief: Belief | None = None) -> Posterior:
    """Mean and covariance of the candidates' quality given the calls (Laplace's approximation).

    `belief` takes the place of θ ~ N(0, v). Exact for log-odds. Always finite: what was never
    compared has the prior's mean and variance.
    """
    cells = calls.groups * len(pairs(calls.size)[0])
    scale, bias, variance, tie = _of_calls(calls, noise)
    soft, hard = calls.is_soft, ~calls.is_soft

    def summed(cell: Integers, values: Array) -> Array:
        counts: Array = np.bincount(cell, values, minlength=cells).astype(np.float64)
        return counts

    weight = (calls.weight * scale**2 / variance)[soft]
    target = (calls.sign * (calls.value - bias) / scale)[soft]
    heard = calls.cell[soft]
    precision, moment = summed(heard, weight), summed(heard, weight * target)
    belief, common = belief or _prior(calls, noise), noise.pair_variance
    if not hard.any():
        return _posterior(belief, calls, common, precision, moment)
    cell, value, tie, bias = calls.cell[hard], calls.value[hard], np.exp(tie[hard]), bias[hard]
    slant = (calls.sign * scale)[hard]
    once, twice = calls.weight[hard] * slant, calls.weight[hard] * slant**2
    eta = np.zeros(cells)
    for _ in range(MAX_STEPS):
        slope, curve = _davidson(slant * eta[cell] + bias, value, tie)
        curvature = summed(cell, twice * curve)
        seen = precision + curvature
        pull = moment + curvature * eta + summed(cell, once * slope)
        mean, _ = _quality(belief, calls, common, seen, pull)
        step = (_apart(mean, calls.size) + common * pull) / (1 + common * seen) - eta
        # Each group by itself: what one prompt holds never changes another's ranking.
        far = np.abs(step).reshape(calls.groups, -1).max(axis=1, keepdims=True)
        if far.max(initial=0.0) < TOLERANCE:
            break
        eta = eta + (step.reshape(calls.groups, -1) * _shorten(far)).ravel()
    return _posterior(belief, calls, common, seen, pull)


def _prior(calls: Calls, noise: Noise) -> Belief:
    shape = (calls.groups, calls.size)
    own = np.broadcast_to(np.eye(calls.size) / noise.quality_variance, (*shape, calls.size))
    return Belief(np.zeros(shape), own)


def _shorten(longest: Array) -> Array:
    return np.minimum(1.0, LONGEST_STEP / np.maximum(longest, 1e-300))


def _of_calls(calls: Calls, noise: Noise) -> tuple[Array, Array, Array, Array]:
    """Each call's κ, b, s² and λ."""
    known = [noise.of(name) for name in calls.judges]
    table = np.array([(j.scale, j.bias, j.variance, j.tie) for j in known]).reshape(-1, 4)
    scale, bias, variance, tie = table[calls.judge].T
    return scale, np.where(calls.has_order, bias, 0.0), variance, tie


def _davidson(x: Array, value: Array, tie: Array) -> tuple[Array, Array]:
    """Slope of a verdict's log-likelihood in x, and minus its curvature; `tie` is e^λ."""
    # Divided by the larger of e^(x/2) and e^(-x/2), so that nothing overflows.
    small = np.exp(-np.abs(x) / 2)
    loser, drawn = small**2, tie * small
    whole = 1 + loser + drawn
    lead = np.copysign((1 - loser) / whole, x)
    return (value - lead) / 2, (1 - drawn / whole - lead**2) / 4


def _quality(
    belief: Belief, calls: Calls, common: float, precision: Array, moment: Array
) -> tuple[Array, Array]:
    """Mean of θ, shape (groups, K), and its covariance, shape (K, K, groups).

    For Gaussian calls about η: each pair's, summed, have this precision and this moment.
    """
    size, (first, second) = calls.size, pairs(calls.size)
    # A pair's calls see θ_i - θ_k with the variance of their mean plus that of u.
    seen = 1 / (1 + common * precision)
    weight = (precision * seen).reshape(calls.groups, -1).T
    pull = (moment * seen).reshape(calls.groups, -1).T
    # Groups stand last: each step of the elimination runs along them.
    matrix = np.zeros((size, size, calls.groups))
    matrix[first, second] = matrix[second, first] = -weight
    rows = np.arange(size)
    matrix[rows, rows] = -matrix.sum(axis=1)
    matrix += belief.precision.transpose(1, 2, 0)
    evidence = np.einsum("gij,gj->ig", belief.precision, belief.mean)
    for pair, (i, k) in enumerate(zip(first, second, strict=True)):
        evidence[i] += pull[pair]
        evidence[k] -= pull[pair]
    covariance = _inverse(matrix)
    mean: Array = (covariance * evidence).sum(axis=1).T
    return mean, covariance


def _inverse(matrix: Array) -> Array:
    """Of many positive definite matrices, in place, by Gauss-Jordan elimination.

    Shape (K, K, groups). Without pivots, which such matrices do not need. A call of LAPACK for each
    matrix would take ten times as long.
    """
    for k in range(len(matrix)):
        column = matrix[:, k].copy()
        pivot = 1 / column[k]
        row = matrix[k] * pivot
        matrix -= column[:, None] * row
        matrix[:, k] = -column * pivot
        matrix[k] = row
        matrix[k, k] = pivot
    return matrix


def _apart(mean: Array, size: int) -> Array:
    first, second = pairs(size)
    apart: Array = (mean[:, first] - mean[:, second]).ravel()
    return apart


def _posterior(
    belief: Belief, calls: Calls, common: float, precision: Array, moment: Array
) -> Posterior:
    mean, by_pair = _quality(belief, calls, common, precision, moment)
    first, second = pairs(calls.size)
    spread = by_pair[first, first] + by_pair[second, second] - 2 * by_pair[first, second]
    # Given θ, η lies between θ_i - θ_k and what the calls say; `share` is the latter's part.
    share = common * precision / (1 + common * precision)
    apart = _apart(mean, calls.size)
    eta = (apart + common * moment) / (1 + common * precision)
    between = (1 - share) ** 2 * spread.T.ravel()
    own = common * (1 - share)
    return Posterior(
        mean=mean,
        covariance=np.ascontiguousarray(by_pair.transpose(2, 0, 1)),
        pair_mean=eta,
        pair_variance=between + own,
        common=(eta - apart) ** 2 + share**2 * spread.T.ravel() + own,
        share=share,
    )
