"""Whether probabilities are borne out when one, two or four judges err about the same answers.

    OMP_NUM_THREADS=1 python benchmarks/several_judges.py

Simulated: six answers a prompt of qualities N(0, 2) to people, who prefer i to k with probability
σ(θ_i - θ_k). A judge takes each quality for θ + e, e ~ N(0, own), and gives log-odds on all pairs
in both orders, with N(0, 0.3) more about each pair and N(0, 0.25) about each call. `claimed` is the
mean P of the likelier answer, `true` the mean chance that a person agrees, `spread` the standard
deviation of (posterior mean - truth) / posterior deviation: above 1, too sure; below 1, not enough.
"""

from __future__ import annotations

import argparse
import math
from itertools import combinations, permutations

import numpy as np
from table import write_table

from judging.judge import Group
from judging.ranking import learn_noise, rank, win_probability
from preferences.records import Candidate, Judgment, Message, Prompt

SIZE = 6


def simulate(prompts: int, judges: int, own: float) -> tuple[float, float, float]:
    """Claimed, true and spread."""
    draw = np.random.default_rng(0)
    groups, said, truth = [], [], []
    for number in range(prompts):
        prompt = Prompt(str(number), (Message("user", "simulated"),), "simulated")
        answers = tuple(
            Candidate(f"{number}/{n}", prompt.prompt_id, "m", "answer", "complete")
            for n in range(SIZE)
        )
        theta = draw.normal(0, 2**0.5, SIZE)
        for judge in range(judges):
            seen = theta + draw.normal(0, own**0.5, SIZE)
            common = draw.normal(0, 0.3**0.5, (SIZE, SIZE))
            for i, k in permutations(range(SIZE), 2):
                shared = common[i, k] if i < k else -common[k, i]
                lead = seen[i] - seen[k] + shared + 0.2 + draw.normal(0, 0.5)
                ids = (answers[i].candidate_id, answers[k].candidate_id)
                p = 1 / (1 + math.exp(-lead))
                name = f"judge {judge}"
                said.append(Judgment(f"{name} {ids}", str(number), "pairwise", name, ids, p))
        groups.append(Group(prompt, answers))
        truth.append(theta)
    claimed, right, off = [], [], []
    for theta, ranking in zip(truth, rank(groups, said, learn_noise(groups, said)), strict=True):
        covariance = np.reshape(ranking.covariance, (SIZE, SIZE))
        for i, k in combinations(range(SIZE), 2):
            variance = covariance[i, i] + covariance[k, k] - 2 * covariance[i, k]
            apart = ranking.mean[i] - ranking.mean[k]
            off.append((apart - theta[i] + theta[k]) / math.sqrt(variance))
            p = win_probability(ranking, i, k)
            chance = 1 / (1 + math.exp(theta[k] - theta[i]))
            claimed.append(max(p, 1 - p))
            right.append(chance if p >= 0.5 else 1 - chance)
    return float(np.mean(claimed)), float(np.mean(right)), float(np.std(off))


def main() -> None:
    """Simulate and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    prompts = parser.parse_args().prompts
    rows = []
    for judges in (1, 2, 4):
        for own in (0.0, 0.5, 1.0):
            claimed, right, spread = simulate(prompts, judges, own)
            rows.append([str(judges), f"{own}", f"{claimed:.3f}", f"{right:.3f}", f"{spread:.2f}"])
            print(rows[-1], flush=True)
    header = ["judges", "own error about an answer", "claimed", "true", "spread"]
    write_table("several_judges", header, rows, f"{prompts:,} prompts a row.")


if __name__ == "__main__":
    main()
