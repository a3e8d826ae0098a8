"""What a label is worth: the dataset against labels spent, routed and drawn at random.

    python benchmarks/labels_spent.py --prompts 400

The miniature's policy answers each prompt six times and its judge compares adaptively, once,
through vLLM. Then people are asked about more and more prompts, and the true reward answers for
them. Which prompts these are is decided by the recipe's own routing, or by lot.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

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
from judging.ranking import rank
from judging.routing import PeopleConfig, choose, routes
from judging.verifier import load_check
from preferences.policies import by_mean
from preferences.records import Judgment
from preferences.store import Store

MINIATURE = Path(__file__).parent.parent / "recipes" / "miniature"
RESULTS = Path(__file__).parent / "results"
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Labels spent, by the prompts there are."""
WAYS = {"routed": 0.25, "by lot": 1.0}
"""The share of the labels that goes to prompts drawn at random."""
SEEDS = range(5)

Judged = list[tuple[Group, Sequence[Judgment]]]
_reward = load_check(f"{MINIATURE / 'world.py'}:reward")


@dataclass(frozen=True)
class Outcome:
    """What a dataset of each prompt's best answer against its worst is like."""

    right: float
    """Share of pairs whose chosen answer has the higher true reward; a tie counts half."""
    found: float
    """Share of prompts whose best answer is the chosen one."""
    reward: float
    """Mean true reward of the chosen answers."""


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


def spend(known: Judged, labels: int, random_share: float, seed: int) -> Outcome:
    """Have people answer so many questions, and rank by what all say together."""
    answers: list[Judgment] = []
    if labels:
        config = PeopleConfig(
            labels="argilla", budget=labels, calibration=random_share, keep=0.9999, seed=seed
        )
        noise = learn_scale(lambda: known, Families(), has_people=False).noise
        standing = list(standings_of(known, noise, config))
        routed = list(routes(standing, choose(standing, config), config.answers))
        answers = [_true_answer(q) for q in questions_of(known, routed)]
    said = [j for _, judgments in known for j in judgments] + answers
    by_prompt = {j.prompt_id: j for j in answers}
    heard = [
        (g, [*judgments, *([by_prompt[p]] if (p := g.prompt.prompt_id) in by_prompt else [])])
        for g, judgments in known
    ]
    scale = learn_scale(lambda: heard, Families(), has_people=True)
    calibration = scale.calibrated.calibration if scale.calibrated else None
    groups = [g for g, _ in known]
    rankings = list(rank(groups, said, scale.noise, calibration, Families()))
    right, found, rewards = [], [], []
    for group, ranking in zip(groups, rankings, strict=True):
        true = {c.candidate_id: _reward(group.prompt, c.response) for c in group.candidates}
        order = by_mean(ranking)
        best, worst = (true[ranking.candidate_ids[n]] for n in (order[0], order[-1]))
        right.append(0.5 + 0.5 * ((best > worst) - (best < worst)))
        found.append(float(best == max(true.values())))
        rewards.append(best)
    return Outcome(fmean(right), fmean(found), fmean(rewards))


def _true_answer(asked: Question) -> Judgment:
    first, second = (_reward(asked.prompt, c.response) for c in asked.candidates)
    verdict = "tie" if first == second else "first" if first > second else "second"
    return human_judgment(asked.about, verdict, "true reward", "")


def main() -> None:
    """Judge once, spend, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--store", type=Path, help="where calls are kept, to be used again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        known = judge(arguments.prompts, arguments.store or Path(folder))
    rows, curves = [], {name: [] for name in WAYS}
    for share in SHARES:
        labels = round(share * len(known))
        for name, random_share in WAYS.items():
            runs = [spend(known, labels, random_share, seed) for seed in SEEDS]
            right, found, reward = (
                [getattr(run, what) for run in runs] for what in ("right", "found", "reward")
            )
            curves[name].append((labels, fmean(found)))
            if labels or name == "routed":
                rows.append(
                    [
                        f"{labels:,}",
                        name if labels else "nobody asked",
                        *(f"{fmean(x):.3f} ± {stdev(x):.3f}" for x in (found, right, reward)),
                    ]
                )
    header = ["labels", "prompts chosen", "best answer found", "pairs right", "true reward chosen"]
    note = (
        f"{len(known):,} prompts of six answers; means over {len(SEEDS)} random slices, ± their "
        "standard deviation. `routed` spends a quarter of the labels by lot, to measure the judge."
    )
    write_table("labels_spent", header, rows, note)
    (RESULTS / "labels_spent.svg").write_text(plot(curves), encoding="utf-8")


def plot(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Best answers found against labels spent, in SVG."""
    width, height, margin = 460, 300, 48
    most = max(x for points in curves.values() for x, _ in points)
    values = [y for points in curves.values() for _, y in points]
    low, high = min(values) - 0.02, max(values) + 0.02

    def place(x: float, y: float) -> tuple[float, float]:
        across = margin + (width - 2 * margin) * x / most
        return across, height - margin - (height - 2 * margin) * (y - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for n in range(5):
        x, y = place(most * n / 4, low + (high - low) * n / 4)
        parts += [
            f'<text x="{x:.0f}" y="{height - margin + 18}" text-anchor="middle">'
            f"{most * n // 4:,}</text>",
            f'<text x="{margin - 6}" y="{y + 4:.0f}" text-anchor="end">'
            f"{low + (high - low) * n / 4:.0%}</text>",
            f'<line x1="{margin}" x2="{width - margin}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>',
        ]
    for number, (name, points) in enumerate(curves.items()):
        colour = ("#2563a8", "#c0392b")[number]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*p) for p in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{width - margin - 8}" y="{height - margin - 34 + 18 * number}" '
            f'text-anchor="end" fill="{colour}">{name}</text>'
        )
    parts += [
        f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">labels spent</text>',
        f'<text x="{margin}" y="{margin - 16}">prompts whose best answer was found</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
