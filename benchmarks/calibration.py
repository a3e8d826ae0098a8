"""What people's labels make of judges' probabilities, simulated: ECE and NLL before and after.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py

Six answers a prompt have qualities N(0, 2) to people, who prefer i to k with probability
σ(θ_i - θ_k). A judge sees them with errors of its own, N(0, 1), three times too strongly, and likes
length: 1.5 logits for an answer e times as long. It compares all pairs in both orders. People label
one pair of some prompts, and the fitted map is tried on 4,000 other prompts. Each row is the mean
of 20 draws, with the standard deviation.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
from table import write_table

from judging.calibration import (
    Calibration,
    Families,
    Label,
    fit,
    fit_isotonic,
    labels_of,
    probabilities,
    reliability,
)
from judging.judge import Group
from judging.ranking import learn_noise, rank
from judging.schedule import all_pairs_both_orders
from preferences.records import Candidate, Judgment, Message, Prompt, Ranking, Verdict

SIZE, UNSEEN, DRAWS = 6, 4000, 20
MADE_UP = "simulated"


def simulate(prompts: int, seed: int) -> tuple[list[Label], list[float]]:
    """One label of a person on each prompt, and what the judge itself says of its pair.

    That is the mean of its probabilities in both orders.
    """
    draw = np.random.default_rng(seed)
    groups, said, people = [], [], {}
    for number in range(prompts):
        prompt = Prompt(f"{seed}-{number}", (Message("user", MADE_UP),), MADE_UP)
        theta = draw.normal(0, 2**0.5, SIZE)
        lengths = np.exp(draw.normal(5, 0.5, SIZE)).astype(int) + 1
        answers = tuple(
            Candidate(
                f"{prompt.prompt_id}/{n}", prompt.prompt_id, "m", "x" * lengths[n], "complete"
            )
            for n in range(SIZE)
        )
        group = Group(prompt, answers)
        seen = dict(
            zip(
                (a.candidate_id for a in answers),
                3 * (theta + draw.normal(0, 1, SIZE)) + 1.5 * np.log(lengths),
                strict=True,
            )
        )
        for shown in all_pairs_both_orders(group):
            ids = (shown.first.candidate_id, shown.second.candidate_id)
            lead = seen[ids[0]] - seen[ids[1]] + 0.5 + draw.normal(0, 2)
            said.append(
                Judgment("-".join(ids), prompt.prompt_id, "pairwise", "judge", ids, _sigmoid(lead))
            )
        one, other = draw.permutation(SIZE)[:2]
        won = draw.random() < _sigmoid(theta[one] - theta[other])
        pair = (answers[one].candidate_id, answers[other].candidate_id)
        verdict: Verdict = "first" if won else "second"
        people[prompt.prompt_id] = Judgment(
            "-".join(pair), prompt.prompt_id, "human", "people", pair, verdict=verdict
        )
        groups.append(group)
    noise = learn_noise(groups[:500], said)
    rankings = rank(groups, said, noise)
    labels = [
        label
        for group, ranking in zip(groups, rankings, strict=True)
        for label in _labels(group, ranking, people[ranking.prompt_id])
    ]
    own = {judgment.candidate_ids: judgment.probability or 0.0 for judgment in said}
    # A label is about the pair as it stands in the group, the lower place first.
    pairs = [tuple(sorted(people[label.prompt_id].candidate_ids)) for label in labels]
    return labels, [(own[i, k] + 1 - own[k, i]) / 2 for i, k in pairs]


def _labels(group: Group, ranking: Ranking, person: Judgment) -> Sequence[Label]:
    candidates = {c.candidate_id: c for c in group.candidates}
    return list(labels_of(ranking, candidates, [person], Families()))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def main() -> None:
    """Simulate, fit, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 100, 200, 500])
    arguments = parser.parse_args()
    everyone, said = simulate(UNSEEN + DRAWS * max(arguments.labels), seed=0)
    unseen, pool = everyone[:UNSEEN], everyone[UNSEEN:]
    won = np.array([label.won for label in unseen])
    raw = reliability(np.array(said[:UNSEEN]), won)
    alone = reliability(probabilities(unseen, Calibration()), won)
    header = ["labels", "map", "ECE", "NLL", "NLL below raw"]
    rows = [
        ["0", "the judge's own probabilities", f"{raw.ece:.3f}", f"{raw.nll:.3f}", ""],
        ["0", "ranking", f"{alone.ece:.3f}", f"{alone.nll:.3f}", f"{1 - alone.nll / raw.nll:.1%}"],
    ]
    for count in arguments.labels:
        found: dict[str, list[tuple[float, float]]] = {"logistic": [], "isotonic on top": []}
        for number in range(DRAWS):
            labels = pool[number * count : (number + 1) * count]
            fitted = fit(labels)
            steps = fit_isotonic(
                probabilities(labels, fitted), np.array([label.won for label in labels])
            )
            calibrated = probabilities(unseen, fitted)
            for name, p in (("logistic", calibrated), ("isotonic on top", steps(calibrated))):
                after = reliability(p, won)
                found[name].append((after.ece, after.nll))
        for name, figures in found.items():
            (ece, nll), (ece_sd, nll_sd) = np.mean(figures, axis=0), np.std(figures, axis=0)
            rows.append(
                [
                    str(count),
                    name,
                    f"{ece:.3f} ± {ece_sd:.3f}",
                    f"{nll:.3f} ± {nll_sd:.3f}",
                    f"{1 - nll / raw.nll:.1%}",
                ]
            )
            print(rows[-1], flush=True)
    write_table("calibration", header, rows)


if __name__ == "__main__":
    main()
