"""How many judge calls find the best of six answers: schedules side by side, simulated.

    python benchmarks/calls_needed.py

Qualities are N(0, 2) logits; a judge's log-odds are the difference, plus 0.3 for the first place,
plus what both orders have in common, N(0, 0.51), plus noise of its own, N(0, 1.34): one call is
right 81 % of the time and the two orders agree 77 %. A hard judge says only which is larger. All
schedules are fitted alike: noise learnt from the judgments themselves, then `rank`.

`uninformative` judges give log-odds whose sign is honest and whose size is drawn at random;
`intransitive` ones have N(0, 2.25) more of their own about every pair; `missing` lose one call in
ten. The calls of the pilot, 24 prompts judged in full, are counted in.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from random import Random

import numpy as np
from table import write_table

from judging.calls import columns
from judging.judge import Comparison, Group
from judging.noise import Array, pairs, posterior
from judging.ranking import best_probabilities, learn_noise, rank
from judging.schedule import (
    PILOT,
    WORST,
    Guide,
    Rounds,
    adaptive,
    all_pairs,
    all_pairs_both_orders,
    carry_out,
    knockout,
    learn_guide,
)
from preferences.records import Candidate, Judgment, Message, Prompt

CANDIDATES = 6


@dataclass(frozen=True)
class World:
    """A kind of judge."""

    name: str
    is_soft: bool
    common: float = 0.51
    uninformative: bool = False
    missing: float = 0.0


WORLDS = (
    World("soft", True),
    World("hard", False),
    World("soft, uninformative", True, uninformative=True),
    World("soft, intransitive", True, common=2.76),
    World("hard, intransitive", False, common=2.76),
    World("soft, 10 % missing", True, missing=0.1),
    World("hard, 10 % missing", False, missing=0.1),
)


class Simulation:
    """Groups whose qualities are known, and a judge of them."""

    def __init__(self, world: World, prompts: int, seed: int) -> None:
        self.world, self.random = world, np.random.default_rng(seed)
        self.groups = [_group(f"{seed} {n}") for n in range(prompts)]
        self.quality: dict[str, float] = {}
        self.common: dict[tuple[str, str], float] = {}
        for group in self.groups:
            ids = [c.candidate_id for c in group.candidates]
            self.quality |= zip(ids, self.random.normal(0, 2**0.5, len(ids)), strict=True)
            for one, other in combinations(ids, 2):
                u = self.random.normal(0, world.common**0.5)
                self.common[one, other], self.common[other, one] = u, -u

    def judge(self, shown: Comparison) -> Judgment:
        """One call."""
        ids = (shown.first.candidate_id, shown.second.candidate_id)
        said = Judgment("-".join(ids), shown.prompt.prompt_id, "pairwise", "judge", ids)
        if self.random.random() < self.world.missing:
            return replace(said, failure="no verdict in reply")
        eta = self.quality[ids[0]] - self.quality[ids[1]] + self.common[ids]
        y = float(eta + 0.3 + self.random.normal(0, 1.34**0.5))
        if not self.world.is_soft:
            return replace(said, verdict="first" if y > 0 else "second")
        if self.world.uninformative:
            y = math.copysign(float(self.random.lognormal(0.5, 1.0)), y)
        return replace(said, probability=1 / (1 + math.exp(-y)))

    def run(self, rounds: Rounds) -> list[Judgment]:
        """Carry a schedule out."""
        return carry_out(rounds, lambda shown: [self.judge(c) for c in shown])

    def pilot(self) -> Guide:
        """What a pilot of this judge teaches."""
        pilot = Simulation(self.world, PILOT, seed=10_000)
        return learn_guide(pilot.groups, pilot.run(all_pairs(pilot.groups)), "judge")

    def outcome(self, said: Sequence[Judgment]) -> tuple[float, float, float]:
        """Share of prompts whose best is found, whose worst is, and the best's mean regret."""
        noise = learn_noise(self.groups[:1000], said)
        best = worst = regret = 0.0
        for group, ranking in zip(self.groups, rank(self.groups, said, noise), strict=True):
            true = np.array([self.quality[c.candidate_id] for c in group.candidates])
            mean = np.array(ranking.mean)
            best += mean.argmax() == true.argmax()
            worst += mean.argmin() == true.argmin()
            regret += true.max() - true[mean.argmax()]
        count = len(self.groups)
        return best / count, worst / count, regret / count / 2**0.5


def _group(name: str) -> Group:
    prompt = Prompt(name, (Message("user", name),), "simulated")
    answers = [
        Candidate(f"{name}/{n}", name, "model", "answer", "complete") for n in range(CANDIDATES)
    ]
    return Group(prompt, tuple(answers))


def random_pairs(groups: Sequence[Group], count: float) -> Rounds:
    """So many of all comparisons, on average, drawn at random without repeating any."""
    drawn = []
    for group in groups:
        draw = Random(group.prompt.prompt_id)
        whole = int(count) + (draw.random() < count - int(count))
        drawn += draw.sample(list(all_pairs_both_orders(group)), whole)
    yield drawn


def swiss(groups: Sequence[Group], guide: Guide, rounds: int) -> Rounds:
    """Disjoint pairs a round, greedily by information × chance to matter; a repeat swaps."""
    first, second = pairs(CANDIDATES)
    said: dict[str, list[Judgment]] = {g.prompt.prompt_id: [] for g in groups}
    asked = np.zeros((len(groups), 2, len(first)), np.bool_)
    for _ in range(rounds):
        ((_, calls),) = columns(groups, said)
        found = posterior(calls, guide.noise)
        score = _swiss_score(found.mean, found.covariance, guide.reply_variance)
        score[asked.all(axis=1)] = -1
        drawn = []
        for number, group in enumerate(groups):
            free = set(range(CANDIDATES))
            order = Random(f"{group.prompt.prompt_id} {_}")
            for pair in sorted(range(len(first)), key=lambda p: (-score[number, p].round(9), p)):
                i, k = int(first[pair]), int(second[pair])
                if {i, k} <= free and score[number, pair] > 0:
                    free -= {i, k}
                    before = asked[number, :, pair]
                    turned = int(not before[1]) if before.any() else order.randrange(2)
                    asked[number, turned, pair] = True
                    one, other = (k, i) if turned else (i, k)
                    ends = group.candidates[one], group.candidates[other]
                    drawn.append(Comparison(group.prompt, *ends))
        for judgment in (yield drawn):
            said[judgment.prompt_id].append(judgment)


def _swiss_score(mean: Array, covariance: Array, variance: float) -> Array:
    first, second = pairs(mean.shape[1])
    spread = (
        covariance[:, first, first]
        + covariance[:, second, second]
        - 2 * covariance[:, first, second]
    )
    best, worst = best_probabilities(mean, covariance), best_probabilities(-mean, covariance)
    matters = np.minimum(best[:, first], best[:, second])
    matters = matters + np.minimum(worst[:, first], worst[:, second]) + 0.05
    score: Array = np.log1p(spread / variance) * matters
    return score


def one_order(groups: Sequence[Group]) -> Rounds:
    """Every pair once, the order at random."""
    yield [
        shown if Random(f"{group.prompt.prompt_id} {n}").random() < 0.5 else shown.swap()
        for group in groups
        for n, shown in enumerate(list(all_pairs_both_orders(group))[::2])
    ]


def measured(
    world: World, prompts: int, gains: Sequence[float]
) -> Iterator[tuple[str, float, float, float, float]]:
    """Each schedule's name, calls a prompt, best found, worst found and regret."""

    def carried_out(
        name: str, schedule: Callable[[Sequence[Group], Guide], Rounds], pilot: int = 0
    ) -> tuple[str, float, float, float, float]:
        simulation = Simulation(world, prompts, seed=1)
        said = simulation.run(schedule(simulation.groups, simulation.pilot()))
        calls = (len(said) + pilot * CANDIDATES * (CANDIDATES - 1)) / prompts
        return name, calls, *simulation.outcome(said)

    yield carried_out("all pairs, both orders", lambda groups, _: all_pairs(groups))
    yield carried_out("all pairs, one order", lambda groups, _: one_order(groups))
    yield carried_out("knock-out", lambda groups, _: knockout(groups))
    for rounds in (3, 5):
        name = f"swiss, {rounds} rounds of 3 pairs"
        yield carried_out(name, partial(swiss, rounds=rounds), PILOT)
    for worst in (0.0, WORST, 1.0):
        for gain in gains:
            name = f"adaptive, min_gain {gain}, worst {worst:.1f}"
            found = carried_out(name, partial(adaptive, min_gain=gain, worst=worst), PILOT)
            yield found
            if worst == WORST:
                count = found[1]
                name = "random pairs, as many"
                yield carried_out(name, lambda groups, _, n=count: random_pairs(groups, n))  # type: ignore[misc]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--gains", type=float, nargs="+", default=[0.01, 0.02, 0.03])
    parser.add_argument("--worlds", nargs="+", default=[w.name for w in WORLDS])
    settings = parser.parse_args()
    rows = []
    for world in (w for w in WORLDS if w.name in settings.worlds):
        for name, *numbers in measured(world, settings.prompts, settings.gains):
            rows.append([world.name, name, f"{numbers[0]:.1f}", *(f"{x:.3f}" for x in numbers[1:])])
            print(rows[-1], flush=True)
    header = ["judge", "schedule", "calls", "best found", "worst found", "regret"]
    note = f"{settings.prompts:,} prompts a row; the standard error of a share is about 0.01."
    write_table("calls_needed", header, rows, note)


if __name__ == "__main__":
    main()
