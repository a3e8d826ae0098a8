"""Which comparisons to ask a judge for, in rounds: what was said in one round guides the next.

`all_pairs` asks everything. `knockout` finds the best with 2(K - 1) calls. `adaptive` asks, prompt
by prompt, for the comparison that promises most: the knowledge gradient with correlated beliefs
(Frazier, Powell & Dayanik 2009, "The knowledge-gradient policy for correlated normal beliefs"), and
stops when none promises enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import TypeVar

import numpy as np

from judging.calls import columns
from judging.judge import Comparison, Group
from judging.noise import Array, Noise, Posterior, pairs, posterior
from judging.ranking import comparisons as compared
from judging.ranking import learn_noise
from preferences.records import Candidate, Judgment

T = TypeVar("T")

Rounds = Generator[list[Comparison], Sequence[Judgment], None]
"""Yields the comparisons of a round and is sent the judgments on them."""
Schedule = Callable[[Sequence[Group]], Rounds]
Compare = Callable[[Sequence[Comparison]], list[Judgment]]
"""Asks for comparisons: one judgment for each, in their order."""

MIN_GAIN = 0.01
WORST = 0.5
PILOT, PILOT_CALLS = 24, 720
"""Prompts judged in full to learn the judge's noise, and about how many calls they may take: 24
groups of 6 take 720."""
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def carry_out(rounds: Rounds, compare: Compare) -> list[Judgment]:
    """All judgments of a schedule, round by round."""
    said: list[Judgment] = []
    comparisons = next(rounds, None)
    while comparisons is not None:
        judgments = compare(comparisons)
        said += judgments
        try:
            comparisons = rounds.send(judgments)
        except StopIteration:
            break
    return said


def all_pairs_both_orders(group: Group) -> Iterator[Comparison]:
    """Every pair of a group in both orders: K(K - 1) comparisons for K candidates.

    Asking in both orders is what lets a judge's liking for the first place cancel out.
    """
    for first, second in combinations(group.candidates, 2):
        yield from _both_orders(Comparison(group.prompt, first, second))


def all_pairs(groups: Sequence[Group]) -> Rounds:
    """Everything there is to ask, in one round."""
    if comparisons := [shown for group in groups for shown in all_pairs_both_orders(group)]:
        yield comparisons


def piloted(groups: Sequence[Group], pilot: Container[str], others: Schedule) -> Rounds:
    """All pairs of the groups whose prompts are in the pilot, and a schedule for the others."""
    yield from all_pairs([g for g in groups if g.prompt.prompt_id in pilot])
    yield from others([g for g in groups if g.prompt.prompt_id not in pilot])


def knockout(groups: Sequence[Group]) -> Rounds:
    """The winners of each round, both orders asked, meet in the next, until one is left."""
    standing = {g.prompt.prompt_id: _shuffled(g) for g in groups}
    while matches := [
        Comparison(group.prompt, one, other)
        for group in groups
        for one, other in _couples(standing[group.prompt.prompt_id])
    ]:
        judgments = yield [shown for match in matches for shown in _both_orders(match)]
        wins: dict[str, float] = defaultdict(float)
        for one_id, other_id, probability in compared(judgments):
            wins[one_id] += probability - 0.5
            wins[other_id] += 0.5 - probability
        for match in matches:
            first_lost = wins[match.first.candidate_id] < wins[match.second.candidate_id]
            loser = match.first if first_lost else match.second
            standing[match.prompt.prompt_id].remove(loser)


@dataclass(frozen=True)
class Guide:
    """What `adaptive` takes for granted while it asks."""

    noise: Noise = field(default_factory=Noise)
    is_soft: bool = True
    """Whether the judge gives probabilities; a verdict tells less."""
    judge: str = ""

    @property
    def reply_variance(self) -> float:
        """Of what one reply says of a pair, in the units of quality."""
        judge = self.noise.of(self.judge)
        # A verdict's Fisher information is scale² / 4 where the two are alike.
        return (judge.variance if self.is_soft else 4.0) / judge.scale**2


def learn_guide(groups: Sequence[Group], judgments: Sequence[Judgment], judge: str) -> Guide:
    """The guide from a pilot: groups of which all pairs were judged in both orders.

    What other judges said of them can be among the judgments; their noise is learnt too.
    """
    read = [j for j in judgments if j.judge == judge and j.failure is None]
    soft = sum(j.probability is not None for j in read)
    return Guide(learn_noise(groups, judgments), 2 * soft >= len(read), judge)


def adaptive(
    groups: Sequence[Group],
    guide: Guide,
    min_gain: float = MIN_GAIN,
    worst: float = WORST,
    known: Sequence[Judgment] = (),
) -> Rounds:
    """A few comparisons a prompt, each chosen by what the ones before it said.

    The first round pairs the candidates off; each later one asks one comparison a prompt. A pair
    asked again is asked in the other order, and never a third time. When no call is expected to
    raise the quality of the best found, plus `worst` times what it lowers that of the worst, by
    `min_gain` standard deviations, the best and the worst meet in both orders, and the prompt is
    done. `known` are other judges' judgments to start from.

    Nothing depends on which groups are asked about together.
    """
    said: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in known:
        said[judgment.prompt_id].append(judgment)
    asked: dict[str, set[tuple[int, int]]] = defaultdict(set)
    threshold = min_gain * guide.noise.quality_variance**0.5
    owed = [g for g in groups if len(g.candidates) > 1]
    orders = {g.prompt.prompt_id: _opening(g) for g in owed if g.prompt.prompt_id not in said}
    while owed:
        if orders:
            for prompt_id, places in orders.items():
                asked[prompt_id].update(places)
            judgments = yield [
                Comparison(group.prompt, group.candidates[first], group.candidates[second])
                for group in owed
                for first, second in orders.get(group.prompt.prompt_id, ())
            ]
            for judgment in judgments:
                said[judgment.prompt_id].append(judgment)
        orders = {}
        for numbers, calls in columns(owed, said):
            found = posterior(calls, guide.noise)
            gains = _knowledge_gradient(found, guide.reply_variance, worst)
            for mean, gain, number in zip(found.mean, gains, numbers, strict=True):
                group, done = owed[number], asked[owed[number].prompt.prompt_id]
                orders[group.prompt.prompt_id] = _most_promising(
                    group, gain, threshold, done
                ) or _audit(mean.round(9), done)
        owed = [g for g in owed if orders[g.prompt.prompt_id]]


def _opening(group: Group) -> list[tuple[int, int]]:
    if len(group.candidates) == 2:
        return [(0, 1), (1, 0)]
    return _couples([group.candidates.index(c) for c in _shuffled(group)])


def _audit(mean: Array, asked: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The orders in which the best and the worst have not met yet."""
    # Of equals the first is the best and the last the worst, so that they are two.
    best, worst = int(mean.argmax()), len(mean) - 1 - int(mean[::-1].argmin())
    return sorted({(best, worst), (worst, best)} - asked)


def _most_promising(
    group: Group, gain: Array, threshold: float, asked: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    places = list(combinations(range(len(group.candidates)), 2))
    for number in np.argsort(-gain, kind="stable"):
        if gain[number] < threshold:
            break
        low, high = places[number]
        straight, swapped = (low, high) in asked, (high, low) in asked
        if straight and swapped:
            continue
        if not straight and not swapped:
            swapped = Random(f"{group.prompt.prompt_id} {low} {high}").random() < 0.5
        return [(low, high) if swapped else (high, low)]
    return []


def _knowledge_gradient(found: Posterior, reply_variance: float, worst: float) -> Array:
    """By how much one more call about each pair is expected to raise max E θ and lower min E θ.

    A reply moves all means along one direction, Cov(θ, η), by a standard normal times its length
    (Frazier et al. 2009, eq. 13); the normal is summed over Gauss-Hermite nodes. Rounded, so that
    a sum taken in another order chooses no other pair. Shape (groups, pairs).
    """
    first, second = pairs(found.mean.shape[1])
    covariance = found.covariance
    # What a reply tells of θ it tells by η, of which the calls so far have settled a share.
    left = (1 - found.share).reshape(len(covariance), 1, -1)
    along = left * (covariance[:, :, first] - covariance[:, :, second])
    variance = found.pair_variance.reshape(len(covariance), 1, -1) + reply_variance
    length = along / np.sqrt(variance)
    best, least = found.mean.max(axis=1)[:, None], found.mean.min(axis=1)[:, None]
    gain = np.zeros((len(covariance), len(first)))
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        moved = found.mean[:, :, None] + node * length
        gain += weight * (moved.max(axis=1) - best + worst * (least - moved.min(axis=1)))
    return gain.round(9)


def _both_orders(comparison: Comparison) -> list[Comparison]:
    return [comparison, comparison.swap()]


def _shuffled(group: Group) -> list[Candidate]:
    order = list(group.candidates)
    Random(group.prompt.prompt_id).shuffle(order)
    return order


def _couples(ones: Sequence[T]) -> list[tuple[T, T]]:
    return list(zip(ones[::2], ones[1::2], strict=False))
