"""From what judges think to what people would say.

A judge's log-odds have their own scale, and it may like long answers or its own family's. It also
errs about an answer, in each of its calls alike, so that it looks surer than it can be. Judges
alone cannot tell: a longer answer may be better. People's verdicts on some of the pairs can. Let m
and s² be the judges' mean and variance of θ_i - θ_k; then people's difference is

    d ~ N(a·m + γ·Δlog length + δ·Δsame family, a² s² + 2r²),    P(people prefer i) = E σ(d)

with r² the variance of what people see in an answer and judges do not. Let S be the variance of an
answer's quality to the judges. Then v = a² S + r² is that to people: the larger it is, the less
chance there is in one person's word. How often people agree with judges tells how steeply P rises
with m, which is one number for a and r² together. How often several people agree about the same
pair tells v, and so the two apart. What labels leave open is as published (`likelihood`), so that
the first label counts for what it is worth.

All terms are differences of numbers of a candidate's own: calibrated rankings are rankings still.
Figures are cross-fitted by prompt: no pair's probability comes from a fit that has seen its prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import numpy.typing as npt

from judging.likelihood import Verdicts, most_probable
from judging.noise import Array
from judging.raters import family_of, opinions
from preferences.records import Candidate, Judgment, Ranking

MIN_LABELS = 50
"""Pairs judged by people below which probabilities do not pass for calibrated."""
MIN_PROMPTS = 20
FOLDS = 5
BINS = 5
"""Of the reliability diagram, with equally many labels each: 200 labels give 40 a bin."""


@dataclass(frozen=True)
class Families:
    """Which models judged, and who wrote the candidates, as far as names tell."""

    judges: frozenset[str] = frozenset()
    """Families of the judges' models."""
    models: Mapping[str, str] = field(default_factory=dict)
    """The models behind the candidates' names."""

    def same(self, candidate: Candidate) -> float:
        """1 where the candidate is by a judge's own family."""
        return float(family_of(self.models.get(candidate.model, candidate.model)) in self.judges)


@dataclass(frozen=True)
class Label:
    """What people said of a pair that judges have ranked."""

    prompt_id: str
    mean: float
    """The judges' posterior mean of θ_first - θ_second."""
    variance: float
    """And its variance."""
    length: float
    """Log length of the first less that of the second."""
    family: float
    """1 where only the first is by a judge's family, -1 where only the second is."""
    won: float
    """1 if people preferred the first, 0 the second; the mean of all who judged the pair."""
    spread: float
    """E θ² of all candidates of the prompt by the judges, about their mean."""
    people: int = 1
    """How many judged the pair."""
    weight: float = 1.0
    """What the label counts: less than 1 where a prompt has more pairs labelled than differences
    of K answers can be independent, K - 1."""


@dataclass(frozen=True)
class Calibration:
    """The map from the judges' scale to people's."""

    scale: float = 1.0
    """a: below 1 where judges are too sure."""
    length: float = 0.0
    """γ: negative where judges like length more than people do."""
    family: float = 0.0
    """δ."""
    residual: float = 0.0
    """r²: variance of a candidate's quality to people that judges do not see."""

    def mean(self, ranking: Ranking, candidates: Sequence[Candidate], families: Families) -> Array:
        """Of the candidates' quality to people."""
        lengths = np.array([log_length(c) for c in candidates])
        same = np.array([families.same(c) for c in candidates])
        offset = self.length * (lengths - lengths.mean()) + self.family * (same - same.mean())
        mean: Array = self.scale * np.array(ranking.mean) + offset
        return mean

    def covariance(self, ranking: Ranking) -> Array:
        """Of the candidates' quality to people."""
        size = len(ranking.candidate_ids)
        seen = self.scale**2 * np.reshape(ranking.covariance, (size, size))
        covariance: Array = seen + self.residual * np.eye(size)
        return covariance


@dataclass(frozen=True)
class Bin:
    """Labels whose predicted winner is about as sure."""

    labels: int
    predicted: float
    """Mean P of the predicted winner."""
    seen: float
    """Share of the labels that agree with it."""


@dataclass(frozen=True)
class Reliability:
    """How far probabilities are borne out."""

    nll: float
    """Mean negative log-likelihood of the labels, in nats."""
    ece: float
    """Expected calibration error: mean |seen - predicted| over the bins, by labels."""
    ece_by_chance: float
    """What so few labels would give on average if the probabilities were exactly right."""
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Calibrated:
    """A calibration with what it was fitted on, and figures on pairs it had not seen."""

    calibration: Calibration
    labels: int
    prompts: int
    before: Reliability
    after: Reliability
    isotonic: Reliability
    """The same with isotonic regression on top of the formula."""
    steps: Isotonic
    """That regression, on all labels."""


def log_length(candidate: Candidate) -> float:
    """Of the answer, in characters."""
    return math.log1p(len(candidate.response))


def labels_of(
    ranking: Ranking,
    candidates: Mapping[str, Candidate],
    people: Iterable[Judgment],
    families: Families,
) -> Iterator[Label]:
    """What people said of pairs in a ranking made by judges alone: one label a pair."""
    place = {c: n for n, c in enumerate(ranking.candidate_ids)}
    said: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for opinion in opinions(people):
        i, k = place.get(opinion.first, -1), place.get(opinion.second, -1)
        # Two answers that are both liked are not two of which neither is preferred.
        unsaid = opinion.leaning == 0.5 and not opinion.has_order
        if i != k and min(i, k) >= 0 and not unsaid:
            leaning = opinion.leaning if i < k else 1 - opinion.leaning
            said[min(i, k), max(i, k)][opinion.rater].append(leaning)
    mean, size = np.array(ranking.mean), len(place)
    covariance = np.reshape(ranking.covariance, (size, size))
    spread = float(mean.var() + covariance.trace() / size - covariance.mean())
    independent = len({n for pair in said for n in pair}) - 1
    for (i, k), by_person in said.items():
        first, second = (candidates[ranking.candidate_ids[n]] for n in (i, k))
        yield Label(
            prompt_id=ranking.prompt_id,
            mean=float(mean[i] - mean[k]),
            variance=float(covariance[i, i] + covariance[k, k] - 2 * covariance[i, k]),
            length=log_length(first) - log_length(second),
            family=families.same(first) - families.same(second),
            won=fmean(fmean(leanings) for leanings in by_person.values()),
            spread=spread * size / max(size - 1, 1),
            people=len(by_person),
            weight=min(1.0, independent / len(said)),
        )


def lacking(labels: Sequence[Label]) -> str | None:
    """What is missing for a fit, as a sentence; None if nothing is."""
    prompts = len({label.prompt_id for label in labels})
    if len(labels) < MIN_LABELS or prompts < MIN_PROMPTS:
        return (
            f"{len(labels)} pairs on {prompts} prompts were judged by people and by judges; "
            f"calibration needs {MIN_LABELS} on {MIN_PROMPTS}"
        )
    return None


def calibrate(labels: Sequence[Label]) -> Calibrated:
    """Fit the map, and say what it is worth on pairs it has not seen."""
    raw = probabilities(labels, Calibration())
    folds = np.array([_fold(label.prompt_id) for label in labels])
    fitted, isotonic = raw.copy(), raw.copy()
    for fold in range(FOLDS):
        held, seen = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if len(held) and len(seen):
            training, test = [labels[n] for n in seen], [labels[n] for n in held]
            found = fit(training)
            steps = fit_isotonic(probabilities(training, found), _won(training))
            fitted[held] = probabilities(test, found)
            isotonic[held] = steps(fitted[held])
    won, whole = _won(labels), fit(labels)
    return Calibrated(
        calibration=whole,
        labels=len(labels),
        prompts=len({label.prompt_id for label in labels}),
        before=reliability(raw, won),
        after=reliability(fitted, won),
        isotonic=reliability(isotonic, won),
        steps=fit_isotonic(probabilities(labels, whole), won),
    )


def fit(labels: Sequence[Label]) -> Calibration:
    """The most probable map; without a label, the judges' own scale."""
    if not labels:
        return Calibration()
    found = most_probable(
        Verdicts(
            mean=np.array([x.mean for x in labels]),
            variance=np.array([x.variance for x in labels]),
            terms=np.array([[x.length, x.family] for x in labels]),
            won=np.array([x.won * x.people for x in labels]),
            people=np.array([x.people for x in labels], dtype=np.float64),
            weight=np.array([x.weight for x in labels]),
            spread=fmean(x.spread for x in labels),
        )
    )
    length, family = found.terms.tolist()
    return Calibration(found.scale, length, family, found.residual)


def probabilities(labels: Sequence[Label], calibration: Calibration) -> Array:
    """P(a person prefers the first) for each label's pair; E σ by MacKay's approximation."""
    c = calibration
    logit = [
        (c.scale * x.mean + c.length * x.length + c.family * x.family)
        / math.sqrt(1 + math.pi * (c.scale**2 * x.variance + 2 * c.residual) / 8)
        for x in labels
    ]
    return _sigmoid(np.array(logit))


@dataclass(frozen=True)
class Isotonic:
    """A step function from probability to probability, never falling, with f(1 - p) = 1 - f(p)."""

    at: tuple[float, ...]
    value: tuple[float, ...]

    def __call__(self, probability: npt.ArrayLike) -> Array:
        """Linear between the steps."""
        found: Array = np.interp(np.asarray(probability, dtype=np.float64), self.at, self.value)
        return found


def fit_isotonic(probability: Array, won: Array) -> Isotonic:
    """The non-decreasing map with the least squared error (pool adjacent violators).

    Each label counts from both sides, so that the map cannot tell first from second.
    """
    x = np.concatenate([probability, 1 - probability]).round(12)
    y = np.concatenate([won, 1 - won])
    # Equal x fall into one block: where they stand with y falling, they are all violators.
    order = np.lexsort((-y, x))
    blocks: list[tuple[float, float, int]] = []
    for block in zip(y[order].tolist(), x[order].tolist(), [1] * len(x), strict=True):
        while blocks and blocks[-1][0] / blocks[-1][2] >= block[0] / block[2]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    # So few labels never show that a probability is 0 or 1.
    least = 1 / (len(won) + 2)
    return Isotonic(
        tuple(sx / n for _, sx, n in blocks),
        tuple(min(max(sy / n, least), 1 - least) for sy, _, n in blocks),
    )


def reliability(probability: Array, won: Array) -> Reliability:
    """NLL, ECE and the bins of a reliability diagram, from the predicted winner's side."""
    inside = np.clip(probability, 1e-6, 1 - 1e-6)
    nll = -(won * np.log(inside) + (1 - won) * np.log1p(-inside)).mean()
    sure = np.maximum(inside, 1 - inside)
    agreed = np.where(inside >= 0.5, won, 1 - won)
    order = np.argsort(sure, kind="stable")
    bins = tuple(
        Bin(len(part), float(sure[part].mean()), float(agreed[part].mean()))
        for part in np.array_split(order, BINS)
        if len(part)
    )
    # |difference| of a mean of n coins from P is √(2 P(1 - P) / πn) on average.
    chance = [
        b.labels * math.sqrt(2 * b.predicted * (1 - b.predicted) / (math.pi * b.labels))
        for b in bins
    ]
    return Reliability(
        nll=float(nll),
        ece=sum(b.labels * abs(b.seen - b.predicted) for b in bins) / len(won),
        ece_by_chance=sum(chance) / len(won),
        bins=bins,
    )


def _won(labels: Sequence[Label]) -> Array:
    return np.array([label.won for label in labels], dtype=np.float64)


def _fold(prompt_id: str) -> int:
    # Not the bytes by which the dataset is split into train and test.
    return hashlib.sha256(f"calibration {prompt_id}".encode()).digest()[0] % FOLDS


def _sigmoid(x: Array) -> Array:
    found: Array = 0.5 * (1 + np.tanh(x / 2))
    return found
