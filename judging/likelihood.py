"""How likely people's verdicts are, and the map from judges' scale under which they are likeliest.

Of n people who compare a pair, w prefer the first (half of one for a tie). They all judge the same
difference d, so that together they are as likely as

    E σ(d)^w σ(-d)^(n - w),    d ~ N(a·m + terms, a² s² + 2r²)

with `calibration`'s notation. The map is sought in v = a² S + r², people's variance of an answer's
quality, and in how many people's verdicts c the judges' word is worth, for both are known roughly
beforehand. A verdict has information σ' = 1/4 at most about a difference, of which 2v is open
beforehand and 2r² after the judges' word: 1 / 2r² = 1 / 2v + c / 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from judging.noise import Array, Noise

PEOPLES_VARIANCE = Noise().quality_variance
CERTAINTY = 2.0
"""1 / v, how much chance is in one person's word, has a gamma prior of this shape and of mean 1/2.
With 90 % probability two people then agree on 62 % to 84 % of the pairs. Published are 63 % with
ties and 81 % without (Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena",
arXiv:2306.05685, table 5)."""
WORTH, WORTH_SPREAD = 2.0, 0.7
"""Median of c and standard deviation of log c. At 2, judges agree with a person by 2 points more
often than another person does, whatever v is; the same table has 3 and 4 points."""
LIKINGS = 4.0
"""Inverse prior variance of γ and δ: within 0.5 or so."""
LONGEST_STEP = 2.0
MAX_STEPS = 50
TOLERANCE = 1e-8
NEARBY = 1e-5
"""Between the slopes whose difference is the curvature."""
# The trapezoidal rule: E of a function of σ(d), d ~ N(., s²), is off by e^(-2π² / 0.2 s) or so.
_NODES = np.linspace(-5, 5, 51)
_WEIGHTS = -(_NODES**2) / 2 - np.log(np.exp(-(_NODES**2) / 2).sum())


@dataclass(frozen=True)
class Verdicts:
    """What judges and people think of labelled pairs, as columns of one row a pair."""

    mean: Array
    """m: the judges' posterior mean of θ_first - θ_second."""
    variance: Array
    """s²: and its variance."""
    terms: Array
    """What judges may like and people not, first less second, shape (pairs, terms)."""
    won: Array
    """w: how many people prefer the first."""
    people: Array
    """n."""
    weight: Array
    """What a pair counts."""
    spread: float
    """S: variance of an answer's quality to the judges."""


@dataclass(frozen=True)
class Map:
    """From judges' scale to people's."""

    scale: float
    """a."""
    terms: Array
    """Log-odds that people have less than judges for one of each term."""
    residual: float
    """r²."""


def most_probable(verdicts: Verdicts) -> Map:
    """The map of the highest posterior density, by Newton."""
    size = 2 + verdicts.terms.shape[1]
    point = np.zeros(size)
    point[:2] = math.log(PEOPLES_VARIANCE), math.log(WORTH)
    for _ in range(MAX_STEPS):
        height, slope = surprise(point, verdicts)
        beside = [surprise(point + shift, verdicts)[1] for shift in NEARBY * np.eye(size)]
        curvature = (np.array(beside) - slope) / NEARBY
        # By its absolute value, so that every step goes down.
        values, vectors = np.linalg.eigh((curvature + curvature.T) / 2)
        step = -vectors @ (vectors.T @ slope / np.maximum(np.abs(values), NEARBY))
        step *= min(1.0, LONGEST_STEP / max(float(np.abs(step).max()), TOLERANCE))
        while np.abs(step).max() > TOLERANCE and surprise(point + step, verdicts)[0] > height:
            step /= 2
        point = point + step
        if np.abs(step).max() <= TOLERANCE:
            break
    scale, residual = _parts(point, verdicts)
    return Map(scale, point[2:], residual)


def surprise(point: Array, verdicts: Verdicts) -> tuple[float, Array]:
    """Minus the log of the posterior density at log v, log c and the terms; its slope."""
    scale, residual = _parts(point, verdicts)
    middle = scale * verdicts.mean + verdicts.terms @ point[2:]
    deviation = np.sqrt(scale**2 * verdicts.variance + 2 * residual)
    won, people = verdicts.won[:, None], verdicts.people[:, None]
    d = middle[:, None] + deviation[:, None] * _NODES
    lost = np.logaddexp(0, d)  # -log σ(-d), and by d more than -log σ(d).
    log_density = won * d - people * lost + _WEIGHTS
    top = log_density.max(axis=1, keepdims=True)
    density = np.exp(log_density - top)
    whole = density.sum(axis=1, keepdims=True)
    likelihood = (verdicts.weight * (top + np.log(whole))[:, 0]).sum()
    pull = verdicts.weight[:, None] * density / whole * (won - people * np.exp(d - lost))
    by_middle, by_deviation = pull.sum(axis=1), pull @ _NODES / deviation

    def rise(scaled: float, left: float) -> float:
        """Of the likelihood, where a grows by the one and r² by the other."""
        wider = scale * scaled * verdicts.variance + left
        return float((by_middle * verdicts.mean * scaled + by_deviation * wider).sum())

    chance = PEOPLES_VARIANCE * math.exp(-point[0])
    prior = CERTAINTY * (chance + point[0]) + LIKINGS * (point[2:] ** 2).sum() / 2
    off = (point[1] - math.log(WORTH)) / WORTH_SPREAD
    prior += off**2 / 2
    # Of r² along log v and log c, and of a² S, which is the rest of v.
    by_variance = residual**2 * math.exp(-point[0])
    by_worth = -(residual**2) * math.exp(point[1]) / 2
    unit = 2 * scale * verdicts.spread
    slope = np.array(
        [
            CERTAINTY * (1 - chance) - rise((math.exp(point[0]) - by_variance) / unit, by_variance),
            off / WORTH_SPREAD - rise(-by_worth / unit, by_worth),
            *(LIKINGS * point[2:] - by_middle @ verdicts.terms),
        ]
    )
    return float(prior - likelihood), slope


def _parts(point: Array, verdicts: Verdicts) -> tuple[float, float]:
    """a and r²."""
    variance, worth = math.exp(point[0]), math.exp(point[1])
    residual = 1 / (1 / variance + worth / 2)
    return math.sqrt((variance - residual) / verdicts.spread), residual
