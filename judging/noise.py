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
`posterior` finds θ for known noise, for many prompts at once; `fit_noise` finds the noise by
expectation-maximisation. Log-odds alone are one linear solve; verdicts take a few Newton steps,
with u eliminated pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

TOLERANCE = 1e-10
MAX_STEPS = 100
LONGEST_STEP = 1.5
"""Newton on a log-logistic can overshoot where it is flat; this keeps it inside its basin."""
EM_STEPS = 200
EM_TOLERANCE = 3e-4
PRIOR_CALLS = 4.0
"""The defaults below count as so many calls each when noise is fitted: few data stay near them."""


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


def _davidson_shares(x: Array, tie: Array) -> tuple[Array, Array, Array]:
    logits = np.stack([x / 2, -x / 2, np.broadcast_to(tie, x.shape)])
    weights = np.exp(logits - logits.max(axis=0))
    first, second, drawn = weights / weights.sum(axis=0)
    return first, second, drawn


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


def fit_noise(batches: Sequence[Calls]) -> Noise:
    """The noise under which these calls are likeliest, near the defaults where they are few.

    Batches hold groups of different sizes and share `judges`. Expectation over θ and u by
    `posterior`, maximisation in closed form for log-odds, by Newton for verdicts.
    """
    if not batches:
        return Noise()
    units = _units(batches)
    named = dict(zip(batches[0].judges, units.tolist(), strict=True))
    # A judge of whom nothing more can be learnt has the default noise, in its own unit.
    noise = Noise({name: JudgeNoise() for name, unit in named.items() if unit != 1})
    telling = [_telling(replace(c, value=c.value / units[c.judge])) for c in batches]
    telling = [calls for calls in telling if len(calls.cell)]
    for _ in range(EM_STEPS if telling else 0):
        before = noise
        noise = _maximise(telling, [posterior(calls, noise) for calls in telling], noise)
        if _change(before, noise) < EM_TOLERANCE:
            break
    judges = {
        name: replace(
            judge,
            scale=judge.scale * named[name],
            bias=judge.bias * named[name],
            variance=judge.variance * named[name] ** 2,
        )
        for name, judge in noise.judges.items()
    }
    return replace(noise, judges=judges)


def _units(batches: Sequence[Calls]) -> Array:
    """Of each judge's log-odds or scores, such that a judge of default noise would differ as much.

    By the defaults differences of scores have E d² = 2 (v + s²) and log-odds E y² = 2v + s². Scores
    can be in any unit; log-odds are taken as they come where there are few.
    """
    units = np.ones(len(batches[0].judges))
    quality, own = Noise().quality_variance, JudgeNoise().variance
    for judge in range(len(units)):
        said = [(c.value[of], c.freedom[of]) for c in batches if (of := _soft_by(c, judge)).any()]
        if not said:
            continue
        squares, freedom = (np.concatenate(column) for column in zip(*said, strict=True))
        squares = squares**2
        if freedom.min() < 1:
            units[judge] = np.sqrt(squares.mean() / (2 * (quality + own))) or 1.0
        else:
            units[judge] = np.sqrt(_shrunk(squares / (2 * quality + own), 1.0))
    return units


def _soft_by(calls: Calls, judge: int) -> Booleans:
    of: Booleans = calls.is_soft & (calls.judge == judge)
    return of


def _telling(calls: Calls) -> Calls:
    """Only the groups with as many calls as candidates.

    Fewer form no circle, so that no call can contradict another: any errors of the judge are as
    likely as none, and what comes first as likely better as only liked. One order of all candidates
    contradicts itself as little, and is K - 1 calls.
    """
    group = calls.cell // max(calls.size * (calls.size - 1) // 2, 1)
    heard = np.bincount(group, calls.freedom, minlength=calls.groups)
    kept = heard[group] > calls.size - 0.5
    by_call = ("cell", "sign", "judge", "value", "is_soft", "has_order", "weight", "freedom")
    return replace(calls, **{name: getattr(calls, name)[kept] for name in by_call})


def _maximise(batches: Sequence[Calls], found: Sequence[Posterior], noise: Noise) -> Noise:
    def together(name: str) -> Any:
        return np.concatenate([getattr(calls, name) for calls in batches])

    judge, soft, value, ordered = (together(n) for n in ("judge", "is_soft", "value", "has_order"))
    weight, freedom = together("weight"), together("freedom")
    x = np.concatenate([c.sign * p.pair_mean[c.cell] for c, p in zip(batches, found, strict=True)])
    spread = np.concatenate([p.pair_variance[c.cell] for c, p in zip(batches, found, strict=True)])
    # Verdicts tell too little of u: where there are no log-odds, the default stands.
    seen = [np.unique(c.cell[c.is_soft]) for c in batches]
    common = np.concatenate([p.common[cells] for p, cells in zip(found, seen, strict=True)])
    quality = np.concatenate(
        [(p.mean**2 + np.einsum("gii->gi", p.covariance)).ravel() for p in found]
    )
    start = Noise()
    judges = dict(noise.judges)
    for number, name in enumerate(batches[0].judges):
        of, fitted = judge == number, noise.of(name)
        for kind, fit in ((of & ~soft, _fit_verdicts), (of & soft, _fit_log_odds)):
            if kind.any():
                seen_by = x[kind], spread[kind], value[kind], ordered[kind]
                fitted = fit(*seen_by, weight[kind], freedom[kind], fitted)
        judges[name] = fitted
    # Only products of κ and θ show. v stays where it is, so the judges' κ take up the rest; were
    # one of them held instead, a judge of whom nothing is heard would drag θ down to nothing.
    unit = math.sqrt(_shrunk(quality, start.quality_variance) / start.quality_variance)
    return Noise(
        {name: replace(j, scale=j.scale * unit) for name, j in judges.items()},
        _shrunk(common, start.pair_variance) / unit**2,
        start.quality_variance,
    )


def _shrunk(squares: Array, start: float) -> float:
    return float((squares.sum() + PRIOR_CALLS * start) / (len(squares) + PRIOR_CALLS))


def _fit_log_odds(
    x: Array,
    spread: Array,
    value: Array,
    ordered: Booleans,
    weight: Array,
    freedom: Array,
    before: JudgeNoise,
) -> JudgeNoise:
    """κ, b and s² by weighted least squares on E[η], with E[η²] where squares are wanted."""
    start = JudgeNoise()
    one = ordered.astype(np.float64)
    prior = PRIOR_CALLS / 2
    normal = np.array(
        [
            [(weight * (x**2 + spread)).sum() + prior, (weight * x * one).sum()],
            [(weight * x * one).sum(), (weight * one).sum() + prior],
        ]
    )
    right = np.array(
        [(weight * x * value).sum() + prior * start.scale, (weight * one * value).sum()]
    )
    scale, bias = np.linalg.solve(normal, right)
    scale = max(float(scale), 0.001)
    rest = weight * ((value - scale * x - bias * one) ** 2 + scale**2 * spread)
    count = freedom.sum() + PRIOR_CALLS
    variance = (rest.sum() + PRIOR_CALLS * start.variance) / count
    return JudgeNoise(scale, float(bias), max(float(variance), 1e-4), before.tie)


# Gauss-Hermite nodes: a verdict's expected log-likelihood over η needs no more.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def _fit_verdicts(
    x: Array,
    spread: Array,
    value: Array,
    ordered: Booleans,
    counts: Array,
    freedom: Array,
    before: JudgeNoise,
) -> JudgeNoise:
    """κ, b and λ by Newton on the expected log-likelihood, held near the defaults."""
    start = np.array([1.0, 0.0, JudgeNoise().tie])
    pull = np.full(3, PRIOR_CALLS / 4)
    if freedom.max() < 1:
        # The verdicts of one order lean on each other: taken one by one they understate κ.
        pull[0] = 1e9
    point = np.array([before.scale, before.bias, before.tie])
    eta = x[:, None] + np.sqrt(spread)[:, None] * _NODES
    weight = counts[:, None] * _WEIGHTS
    one = np.broadcast_to(ordered.astype(np.float64)[:, None], eta.shape)
    said = np.broadcast_to(value[:, None], eta.shape)
    # d(logits of first, second, tie) / d(κ, b, λ)
    lead = np.stack([eta / 2, one / 2, np.zeros_like(eta)])
    drawn_too = np.stack([np.zeros_like(eta), np.zeros_like(eta), np.ones_like(eta)])
    for _ in range(20):
        first, second, drawn = _davidson_shares(point[0] * eta + point[1] * one, point[2])
        slope = (said - (first - second)) * weight
        missing = ((said == 0) - drawn) * weight
        gradient = np.einsum("pnk,nk->p", lead, slope) + np.einsum("pnk,nk->p", drawn_too, missing)
        gradient -= pull * (point - start)
        mean = lead * (first - second) + drawn_too * drawn
        square = np.einsum("pnk,qnk,nk->pq", lead, lead, (first + second) * weight)
        square += np.einsum("pnk,qnk,nk->pq", drawn_too, drawn_too, drawn * weight)
        information = square - np.einsum("pnk,qnk,nk->pq", mean, mean, weight) + np.diag(pull)
        step = np.linalg.solve(information, gradient)
        point = point + step * min(1.0, LONGEST_STEP / max(float(np.abs(step).max()), 1e-300))
        if np.abs(step).max() < 1e-8:
            break
    return JudgeNoise(
        max(float(point[0]), 0.001), float(point[1]), before.variance, float(point[2])
    )


def _change(one: Noise, other: Noise) -> float:
    """The largest change of any number, variances by their logarithms."""

    def numbers(noise: Noise) -> Array:
        judges = [(j.scale, j.bias, np.log(j.variance), j.tie) for j in noise.judges.values()]
        shared = [np.log(noise.pair_variance), np.log(noise.quality_variance)]
        return np.array([x for row in judges for x in row] + shared)

    if one.judges.keys() != other.judges.keys():
        return float("inf")
    return float(np.abs(numbers(one) - numbers(other)).max())
