"""Win rates as they would be if both answers were equally long.

Judges like long answers, so a model can win by length alone. A logistic regression tells how much
of a model's wins goes with the difference of lengths, and the win rate is then read off with that
difference set to zero (Dubois, Galambosi, Liang & Hashimoto 2024, "Length-Controlled AlpacaEval",
arXiv 2404.04475):

    logit P(model wins on prompt x) = θ_model + φ_model·tanh(Δlength / its deviation) + ψ_model·γ_x

γ_x, how hard a prompt is for any model, comes first, from all models together with one φ and ψ = 1.
Then each model's θ, φ and ψ are fitted to its own comparisons, and its win rate is the mean over
its prompts of σ(θ + ψγ_x). All have normal priors, so that everything is finite: γ_x has mean 0, φ
and ψ the values of the first step, each with a deviation of 1; θ is nearly free.

What is simpler than in the paper: the authors draw φ towards that of models told to be brief or
verbose, of which a user has none; here it is drawn towards what all models share. And ψγ_x is
dropped for prompts on which fewer than three models were compared, because one or two comparisons
hardly tell a hard prompt from a lost one; a single model's φ is drawn towards 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preferences.estimate import Estimate, clustered_mean

Array = NDArray[np.float64]
PRECISION = 1.0
"""Of the priors on φ, ψ and γ: one over their variance."""
NEARLY_FREE = 0.01
"""The same for θ, and for the φ that models share: a deviation of 10 logits."""
MIN_MODELS = 3
"""To say how hard a prompt is. In a simulation the win rates of two models came out worse with γ
than without (root mean square error .043 against .024), of three as good, of more better."""
PRECISIONS = np.array([NEARLY_FREE, PRECISION, PRECISION])
STEPS = 100
"""At most; a fit takes about ten."""


@dataclass(frozen=True, slots=True)
class Bout:
    """One comparison of a model's answer with the baseline's."""

    model: str
    prompt_id: str
    win: float
    """P(the model's answer is better), from 0 to 1; the mean over both orders."""
    longer_by: float
    """Characters of the model's answer minus those of the baseline's."""


@dataclass(frozen=True)
class LengthControlled:
    """A model's win rate against the baseline, with and without its length."""

    model: str
    bouts: int
    raw: float
    """Mean of the wins."""
    controlled: Estimate | None
    """The win rate at equal lengths, with an interval by prompt; None where all its differences of
    length are the same, so that nothing tells length from quality."""
    length_effect: float | None
    """φ: by how many logits the odds rise from answers as long to ones much longer."""


def length_controlled(bouts: Iterable[Bout]) -> list[LengthControlled]:
    """Win rates at equal lengths, in the order in which the models first occur."""
    by_model: dict[str, list[Bout]] = defaultdict(list)
    for bout in bouts:
        by_model[bout.model].append(bout)
    models = {name: _columns(found) for name, found in by_model.items()}
    known = {name: columns for name, columns in models.items() if columns is not None}
    shared, difficulty = _shared(by_model, known)
    results = []
    for name, found in by_model.items():
        controlled, effect = None, None
        if name in known:
            length, wins = known[name]
            hard = np.array([difficulty.get(b.prompt_id, 0.0) for b in found])
            features = np.column_stack([np.ones(len(wins)), length, hard])
            fitted = _fit(features, wins, np.array([0.0, shared, 1.0]))
            controlled = _at_equal_lengths(fitted, features, wins, [b.prompt_id for b in found])
            effect = float(fitted[1])
        raw = sum(bout.win for bout in found) / len(found)
        results.append(LengthControlled(name, len(found), raw, controlled, effect))
    return results


def _columns(bouts: Sequence[Bout]) -> tuple[Array, Array] | None:
    """Lengths, from -1 to 1, and wins; None where all lengths differ by the same."""
    longer_by = np.array([bout.longer_by for bout in bouts], dtype=np.float64)
    deviation = longer_by.std(ddof=1) if len(bouts) > 1 else 0.0
    if not deviation:
        return None
    return np.tanh(longer_by / deviation), np.array([bout.win for bout in bouts])


def _shared(
    bouts: dict[str, list[Bout]], columns: dict[str, tuple[Array, Array]]
) -> tuple[float, dict[str, float]]:
    """φ of all models together, and γ of each prompt on which enough were compared.

    By Newton steps on θ of each model, φ, and γ. A prompt's γ meets no other prompt's, so it is
    eliminated from each step, and the work grows with the comparisons alone.
    """
    times = Counter(
        prompt_id for name in columns for prompt_id in {b.prompt_id for b in bouts[name]}
    )
    places = {p: n for n, p in enumerate(p for p, count in times.items() if count >= MIN_MODELS)}
    if not places:
        return 0.0, {}
    rows = [
        (model, places[bout.prompt_id], length, bout.win)
        for model, (name, (lengths, _)) in enumerate(columns.items())
        for bout, length in zip(bouts[name], lengths.tolist(), strict=True)
        if bout.prompt_id in places
    ]
    model, prompt, length, win = (np.array(column) for column in zip(*rows, strict=True))
    features = np.column_stack([model[:, None] == np.arange(len(columns)), length]).astype(float)
    common, hard = np.zeros(len(columns) + 1), np.zeros(len(places))

    def by_prompt(values: Array) -> Array:
        return np.bincount(prompt, values, len(places)).astype(float)

    for _ in range(STEPS):
        chance = _sigmoid(features @ common + hard[prompt])
        left, weight = win - chance, chance * (1 - chance)
        slope = features.T @ left - NEARLY_FREE * common
        slope_hard = by_prompt(left) - PRECISION * hard
        own = by_prompt(weight) + PRECISION
        mixed = np.stack([by_prompt(weight * column) for column in features.T])
        curvature = (features.T * weight) @ features + NEARLY_FREE * np.eye(len(common))
        reduced = curvature - (mixed / own) @ mixed.T
        step = np.linalg.solve(reduced, slope - (mixed / own) @ slope_hard).astype(np.float64)
        step_hard = (slope_hard - step @ mixed) / own
        scale = _shortened(step, step_hard)
        common, hard = common + scale * step, hard + scale * step_hard
        if max(np.abs(step).max(), np.abs(step_hard).max()) < 1e-9:
            break
    return float(common[-1]), {p: float(hard[n]) for p, n in places.items()}


def _fit(features: Array, wins: Array, prior: Array) -> Array:
    """The likeliest θ, φ and ψ of one model."""
    found = prior.copy()
    for _ in range(STEPS):
        slope = features.T @ (wins - _sigmoid(features @ found)) - PRECISIONS * (found - prior)
        step = np.linalg.solve(_curvature(found, features), slope).astype(np.float64)
        found = found + _shortened(step) * step
        if np.abs(step).max() < 1e-9:
            break
    return found


def _curvature(coefficients: Array, features: Array) -> Array:
    chance = _sigmoid(features @ coefficients)
    found: Array = (features.T * (chance * (1 - chance))) @ features + np.diag(PRECISIONS)
    return found


def _at_equal_lengths(
    fitted: Array, features: Array, wins: Array, prompts: Sequence[str]
) -> Estimate | None:
    """The mean of σ(θ + ψγ), with an interval clustered by prompt.

    A bout moves the mean by its own σ(θ + ψγ), and by what it adds to the slope of the likelihood,
    which moves θ, φ and ψ: the influence function of a mean of predictions. The difficulties are
    taken as known.
    """
    equal = features * [1, 0, 1]
    chance = _sigmoid(equal @ fitted)
    gradient = (equal.T * (chance * (1 - chance))).mean(axis=1)
    left = wins - _sigmoid(features @ fitted)
    moved = np.linalg.solve(_curvature(fitted, features), gradient) @ (features.T * left)
    # The priors keep the influences from adding up to nothing; the mean is to be that of the fit.
    values = chance + len(wins) * (moved - moved.mean())
    return clustered_mean(zip(prompts, values.tolist(), strict=True))


def _shortened(*steps: Array) -> float:
    """What to multiply a step with so that no coefficient moves by more than a logit at once.

    The likelihood is concave, but a whole Newton step from far away can leap over the top.
    """
    longest = max(float(np.abs(step).max()) for step in steps)
    return min(1.0, 1.0 / longest) if longest else 1.0


def _sigmoid(x: Array) -> Array:
    found: Array = np.exp(-np.logaddexp(0.0, -x))
    return found
