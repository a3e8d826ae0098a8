"""The noise of judges, learnt from their calls by expectation-maximisation.

Expectation over θ and u is `noise.posterior`; maximisation is in closed form for log-odds and by
Newton for verdicts. Every default counts as a few calls, so a judge who said little stays near it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from judging.noise import (
    LONGEST_STEP,
    Array,
    Booleans,
    Calls,
    JudgeNoise,
    Noise,
    Posterior,
    posterior,
)

EM_STEPS = 200
EM_TOLERANCE = 3e-4
PRIOR_CALLS = 4.0
"""Each default of `Noise` and `JudgeNoise` counts as so many calls."""


def fit_noise(batches: Sequence[Calls]) -> Noise:
    """The noise under which these calls are likeliest, near the defaults where they are few.

    Batches hold groups of different sizes and share `judges`.
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


def _davidson_shares(x: Array, tie: Array) -> tuple[Array, Array, Array]:
    logits = np.stack([x / 2, -x / 2, np.broadcast_to(tie, x.shape)])
    weights = np.exp(logits - logits.max(axis=0))
    first, second, drawn = weights / weights.sum(axis=0)
    return first, second, drawn


def _change(one: Noise, other: Noise) -> float:
    """The largest change of any number, variances by their logarithms."""

    def numbers(noise: Noise) -> Array:
        judges = [(j.scale, j.bias, np.log(j.variance), j.tie) for j in noise.judges.values()]
        shared = [np.log(noise.pair_variance), np.log(noise.quality_variance)]
        return np.array([x for row in judges for x in row] + shared)

    if one.judges.keys() != other.judges.keys():
        return float("inf")
    return float(np.abs(numbers(one) - numbers(other)).max())
