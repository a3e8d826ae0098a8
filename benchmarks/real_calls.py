"""Best answer found against judge calls, from real log-odds: the miniature's judge through vLLM.

    python benchmarks/real_calls.py --prompts 400

The miniature's policy answers each prompt seven times; its judge compares every pair in both
orders, once. Each schedule is then carried out on what the judge said. World.py knows the true
reward. The seventh answer stands by for the pointwise way of judging: the judge reads pairs only,
so each of the six is scored by its comparison with the seventh, in both orders.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from calls_needed import one_order, random_pairs, swiss
from table import write_table

from flows import stages
from flows.plan import make_plan
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.run import Run
from flows.run import groups as groups_of
from judging.judge import Comparison, Group
from judging.ranking import learn_noise, rank
from judging.schedule import (
    PILOT,
    Rounds,
    adaptive,
    all_pairs,
    all_pairs_both_orders,
    carry_out,
    knockout,
    learn_guide,
)
from judging.verifier import load_check
from preferences.records import Judgment
from preferences.store import Store

MINIATURE = Path(__file__).parent.parent / "recipes" / "miniature"
CANDIDATES = 6
Said = dict[tuple[str, str], Judgment]


def judge_everything(prompts: int, store: Path) -> tuple[list[Group], Said]:
    """The groups of seven and every judgment, by the ids shown."""
    loaded = load_recipe(MINIATURE / "recipe.yaml", dataset_only=True)
    assert loaded.prompts is not None
    (policy,), (judge,) = loaded.candidates, loaded.judges
    recipe = loaded.model_copy(
        update={
            "prompts": loaded.prompts.model_copy(update={"limit": prompts}),
            "candidates": (policy.model_copy(update={"samples": CANDIDATES + 1}),),
            "judges": (judge.model_copy(update={"schedule": "all_pairs"}),),
        }
    )
    run = Run(make_plan(recipe), Store(store), Progress("people"))
    stages.make_prompts(run)
    stages.make_candidates(run, 0)
    stages.make_judgments(run, 0)
    groups = [g for shard in run.shards for g in groups_of(run, shard)]
    judgments = run.store.read(run.plan.judgments[0], Judgment)
    said = {(j.candidate_ids[0], j.candidate_ids[1]): j for j in judgments}
    return [g for g in groups if len(g.candidates) == CANDIDATES + 1], said


def carried_out(rounds: Rounds, said: Said) -> list[Judgment]:
    """The judgments a schedule asks for."""
    return carry_out(rounds, lambda shown: [_looked_up(c, said) for c in shown])


def _looked_up(shown: Comparison, said: Said) -> Judgment:
    return said[shown.first.candidate_id, shown.second.candidate_id]


def main() -> None:
    """Judge, replay, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--store", type=Path, help="where calls are kept, to be used again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, said = judge_everything(arguments.prompts, arguments.store or Path(folder))
    reward = load_check(f"{MINIATURE / 'world.py'}:reward")
    groups = [Group(g.prompt, g.candidates[:CANDIDATES]) for g in whole]
    true = np.array([[reward(g.prompt, c.response) for c in g.candidates] for g in groups])
    rows = []

    def tell(name: str, calls: float, mean: np.ndarray) -> None:
        every = np.arange(len(groups))
        best, worst = true[every, mean.argmax(axis=1)], true[every, mean.argmin(axis=1)]
        found = (best == true.max(axis=1)).mean(), (worst == true.min(axis=1)).mean()
        regret = (true.max(axis=1) - best).mean()
        rows.append([name, f"{calls:.1f}", *(f"{x:.3f}" for x in (*found, regret))])

    def ranked(judgments: Sequence[Judgment]) -> np.ndarray:
        noise = learn_noise(groups, judgments)
        return np.array([r.mean for r in rank(groups, judgments, noise)])

    pilot = [c for g in groups[:PILOT] for c in all_pairs_both_orders(g)]
    guide = learn_guide(groups[:PILOT], [_looked_up(c, said) for c in pilot], "judge")
    schedules: list[tuple[str, Callable[[Sequence[Group]], Rounds]]] = [
        ("all pairs, both orders", all_pairs),
        ("all pairs, one order", one_order),
        ("knock-out", knockout),
        *((f"swiss, {n} rounds of 3 pairs", partial(swiss, guide=guide, rounds=n)) for n in (3, 5)),
        *(
            (f"adaptive, min_gain {gain}", partial(adaptive, guide=guide, min_gain=gain))
            for gain in (0.005, 0.01, 0.02, 0.03, 0.05)
        ),
    ]
    for name, schedule in schedules:
        asked = carried_out(schedule(groups), said)
        # The pilot's prompts keep what the pilot asked.
        extra = pilot if name.startswith(("adaptive", "swiss")) else []
        kept = {j.judgment_id: j for j in asked} | {
            j.judgment_id: j for j in (_looked_up(c, said) for c in extra)
        }
        calls = len(kept) / len(groups)
        tell(name, calls, ranked(list(kept.values())))
        if name.startswith("adaptive"):
            drawn = carried_out(random_pairs(groups, calls), said)
            tell("random pairs, as many", calls, ranked(drawn))
    for orders, calls in ((1, CANDIDATES), (2, 2 * CANDIDATES)):
        scores = []
        for group in whole:
            last = group.candidates[CANDIDATES].candidate_id
            ids = [c.candidate_id for c in group.candidates[:CANDIDATES]]
            ahead = [_log_odds(said[i, last]) for i in ids]
            behind = [-_log_odds(said[last, i]) for i in ids]
            scores.append(
                [a + (b if orders == 2 else 0.0) for a, b in zip(ahead, behind, strict=True)]
            )
        tell(f"pointwise, {orders} order{'s'[: orders - 1]}", calls, np.array(scores))
    header = ["schedule", "calls", "best found", "worst found", "regret"]
    note = (
        f"{len(groups):,} prompts of six answers; the standard error of a share is about "
        f"{0.5 / len(groups) ** 0.5:.3f}. Regret is in true reward, on average {true.mean():.2f} "
        f"and of the best of six {true.max(axis=1).mean():.2f}. The pilot's calls are counted in."
    )
    write_table("real_calls", header, rows, note)


def _log_odds(judgment: Judgment) -> float:
    assert judgment.probability is not None
    p = min(max(judgment.probability, 1e-3), 1 - 1e-3)
    return float(np.log(p / (1 - p)))


if __name__ == "__main__":
    main()
