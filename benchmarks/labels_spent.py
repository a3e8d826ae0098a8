"""What a label is worth: the dataset against labels spent, by who is asked about what.

    python benchmarks/labels_spent.py --prompts 400

The miniature's policy answers each prompt six times and its judge compares adaptively, once,
through vLLM. Then people are asked about more and more prompts, and the true reward answers for
them, always right and always the same. A quarter of the questions goes to a random slice, the best
answer against the lowest; the rest asks which of the two likeliest is the best. `routed` asks where
the recipe's routing does and `by lot` about prompts drawn at random.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
from plot import COLOURS, Curve, Point, plot
from table import write_table

from flows import stages
from flows.people import questions_of, standings_of
from flows.plan import make_plan
from flows.progress import Progress
from flows.rankings import learn_scale
from flows.recipe import load_recipe
from flows.run import Run, judged
from judging.calibration import Families
from judging.judge import Group
from judging.people import Question, human_judgment
from judging.ranking import best_probabilities, rank, win_probability
from judging.routing import PeopleConfig, Standing, choose, routes
from judging.verifier import load_check
from preferences.estimate import Estimate, clustered_mean
from preferences.policies import by_mean
from preferences.records import Candidate, Judgment, Prompt, Ranking, Verdict
from preferences.store import Store

MINIATURE = Path(__file__).parent.parent / "recipes" / "miniature"
RESULTS = Path(__file__).parent / "results"
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Labels spent, by the prompts there are."""
SLICE = 0.25
SEEDS = range(5)

Judged = list[tuple[Group, Sequence[Judgment]]]
_reward = load_check(f"{MINIATURE / 'world.py'}:reward")


@dataclass(frozen=True)
class Way:
    """How labels are spent."""

    is_routed: bool
    annotators: int = 1
    """Of each question of the random slice; each is a label."""
    answers: int = 2
    """Shown in a question; an order of more is one label too."""


WAYS = {
    "by lot": Way(is_routed=False),
    "routed": Way(is_routed=True),
    "routed, three on the slice": Way(is_routed=True, annotators=3),
    "routed, orders of six": Way(is_routed=True, answers=6),
}
FIRST = next(iter(WAYS))


@dataclass(frozen=True)
class Outcome:
    """What a prompt's best answer against its lowest is like."""

    prompt_id: str
    found: float
    """1 if the chosen answer is a best one, else 0."""
    claimed: float
    """P that it is."""
    right: float
    """1 if the chosen answer has the higher true reward, a half if they are equal."""
    probability: float
    """P that a person prefers it."""


def judge(prompts: int, store: Path) -> Judged:
    """The miniature's groups and all that its judge says of them."""
    loaded = load_recipe(MINIATURE / "recipe.yaml", dataset_only=True)
    assert loaded.prompts is not None
    limited = loaded.prompts.model_copy(update={"limit": prompts})
    recipe = loaded.model_copy(update={"prompts": limited})
    run = Run(make_plan(recipe), Store(store), Progress("people"))
    stages.make_prompts(run)
    stages.make_candidates(run, 0)
    stages.make_judgments(run, 0)
    return [(g, said) for g, said in judged(run) if len(g.candidates) > 1]


def stand(known: Judged) -> list[Standing]:
    """What routing knows before anybody is asked."""
    noise = learn_scale(lambda: known, Families(), has_people=False).noise
    return list(standings_of(known, noise, PeopleConfig(labels="argilla", budget=1)))


def spend(
    known: Judged, standing: Sequence[Standing], labels: int, way: Way, seed: int
) -> list[Outcome]:
    """Have people give so many labels, and rank by what all say together."""
    answers = _answers(known, standing, labels, way, seed) if labels else []
    heard = [
        (g, [*said, *(a for a in answers if a.prompt_id == g.prompt.prompt_id)])
        for g, said in known
    ]
    scale = learn_scale(lambda: heard, Families(), has_people=True)
    calibration = scale.calibrated.calibration if scale.calibrated else None
    everything = (j for _, said in heard for j in said)
    rankings = rank([g for g, _ in known], everything, scale.noise, calibration, Families())
    return [outcome(group, ranking) for (group, _), ranking in zip(known, rankings, strict=True)]


def _answers(
    known: Judged, standing: Sequence[Standing], labels: int, way: Way, seed: int
) -> list[Judgment]:
    budget = round(labels / (1 + SLICE * (way.annotators - 1)))
    config = PeopleConfig(
        labels="argilla",
        budget=budget,
        calibration=SLICE,
        keep=0.9999,
        seed=seed,
        answers=way.answers,
    )
    chosen = standing if way.is_routed else _shuffled(standing, seed)
    routed = list(routes(standing, choose(chosen, config), config.answers))
    return [
        _true_answer(asked, f"annotator {number}")
        for asked in questions_of(known, routed)
        for number in range(way.annotators if asked.purpose == "calibrate" else 1)
    ]


def _shuffled(standing: Sequence[Standing], seed: int) -> list[Standing]:
    """With an answer worth as much as the lot says."""
    draw = random.Random(seed)
    return [replace(s, regret=1 + draw.random()) for s in standing]


def _true_answer(asked: Question, annotator: str) -> Judgment:
    rewards = rewards_of(asked.prompt, asked.candidates)
    said: Verdict | tuple[float, ...] = rewards
    if len(rewards) == 2:
        first, second = rewards
        said = "tie" if first == second else "first" if first > second else "second"
    return human_judgment(asked.about, said, annotator, "")


def rewards_of(prompt: Prompt, candidates: Sequence[Candidate]) -> tuple[float, ...]:
    """True rewards, without what summing in another order adds to the last digits."""
    return tuple(round(_reward(prompt, c.response), 9) for c in candidates)


def outcome(group: Group, ranking: Ranking) -> Outcome:
    """Against the true reward."""
    true = rewards_of(group.prompt, group.candidates)
    order = by_mean(ranking)
    chosen, lowest = order[0], order[-1]
    mean = np.array([ranking.mean])
    best = best_probabilities(mean, np.reshape(ranking.covariance, (1, mean.size, mean.size)))
    return Outcome(
        prompt_id=ranking.prompt_id,
        found=float(true[chosen] == max(true)),
        claimed=float(best[0, chosen]),
        right=0.5 + 0.5 * ((true[chosen] > true[lowest]) - (true[chosen] < true[lowest])),
        probability=win_probability(ranking, chosen, lowest),
    )


def mean_of(runs: Sequence[Sequence[Outcome]], what: str) -> Estimate:
    """Over prompts and seeds, with an interval by prompts."""
    found = clustered_mean((o.prompt_id, getattr(o, what)) for run in runs for o in run)
    assert found is not None
    return found


def above(runs: Sequence[Sequence[Outcome]], others: Sequence[Sequence[Outcome]]) -> Estimate:
    """How many more best answers are found, prompt by prompt."""
    found = clustered_mean(
        (one.prompt_id, one.found - other.found)
        for run, against in zip(runs, others, strict=True)
        for one, other in zip(run, against, strict=True)
    )
    assert found is not None
    return found


def ceiling(known: Judged, standing: Sequence[Standing]) -> str:
    """What there is to gain at all, in words."""
    rivals = {s.prompt_id: s.rivals for s in standing}
    among, several, ties = [], [], []
    for group, _ in known:
        true = rewards_of(group.prompt, group.candidates)
        asked = rivals.get(group.prompt.prompt_id, ())
        best = [
            c.candidate_id for c, t in zip(group.candidates, true, strict=True) if t == max(true)
        ]
        among.append(bool({*best} & {*asked}))
        several.append(len(best) > 1)
        ties += [one == other for one, other in combinations(true, 2)]
    return (
        f"A best answer is one of the judge's two likeliest in {fmean(among):.3f} of the prompts: "
        "no label on those two finds more, and an order of all six always holds it. "
        f"{fmean(several):.3f} of the prompts have several best answers, and {fmean(ties):.3f} of "
        "all pairs the same true reward."
    )


def main() -> None:
    """Judge once, spend, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--store", type=Path, help="where calls are kept, to be used again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        known = judge(arguments.prompts, arguments.store or Path(folder))
    standing = stand(known)
    nobody = [spend(known, standing, 0, WAYS[FIRST], 0)] * len(SEEDS)
    rows = [row(0, "nobody asked", nobody, "", "")]
    points = {name: [point(0, nobody)] for name in WAYS}
    for share in SHARES:
        labels = round(share * len(known))
        lot: list[list[Outcome]] = []
        for name, way in WAYS.items():
            runs = [spend(known, standing, labels, way, seed) for seed in SEEDS]
            lot = runs if name == FIRST else lot
            more = "" if name == FIRST else str(above(runs, lot))
            rows.append(row(labels, name, runs, str(above(runs, nobody)), more))
            print(rows[-1], flush=True)
            points[name].append(point(labels, runs))
    header = [
        "labels",
        "asked",
        "best answer found",
        "P(best)",
        "above nobody",
        "above by lot",
        "pairs right",
        "P(right)",
    ]
    note = (
        f"{len(known):,} prompts of six answers, means over {len(SEEDS)} random slices, with 95 % "
        "intervals by prompts. P(best) is the mean probability claimed for the chosen answer being "
        "the best, and P(right) for a person preferring it to the lowest. "
        f"{ceiling(known, standing)}"
    )
    write_table("labels_spent", header, rows, note)
    curves = [Curve(name, points[name], COLOURS[n]) for n, name in enumerate(points)]
    picture = plot(curves, "labels spent", "best answer found", "What a label is worth")
    (RESULTS / "labels_spent.svg").write_text(picture, encoding="utf-8")


def point(labels: int, runs: Sequence[Sequence[Outcome]]) -> Point:
    """Of the picture."""
    return Point(labels, mean_of(runs, "found").mean)


def row(
    labels: int, name: str, runs: Sequence[Sequence[Outcome]], nobody: str, lot: str
) -> list[str]:
    """Of the table."""
    found, right = mean_of(runs, "found"), mean_of(runs, "right")
    claimed, probability = (mean_of(runs, what).mean for what in ("claimed", "probability"))
    return [
        f"{labels:,}",
        name,
        str(found),
        f"{claimed:.3f}",
        nobody,
        lot,
        str(right),
        f"{probability:.3f}",
    ]


if __name__ == "__main__":
    main()
