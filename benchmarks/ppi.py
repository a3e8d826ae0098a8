"""Do prediction-powered intervals hold the truth, and how many human labels do they save?

    python benchmarks/ppi.py --runs 4000

Synthetic: people's verdicts are two-way, a judge agrees with them on a given share, and people
judged a random sample of the prompts. A biased judge errs in favour of one side alone. Each run
draws anew and asks `judging.ppi` for the mean of what people would say of all.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
from table import write_table

from judging.ppi import powered_mean

Z90 = 1.644854
"""Of the normal distribution: 90 % lie within this many standard deviations."""
CASES = (
    # agreement, share of wins, human labels, all prompts, biased
    (0.65, 0.5, 200, 4000, False),
    (0.75, 0.5, 50, 4000, False),
    (0.75, 0.5, 100, 4000, False),
    (0.75, 0.5, 200, 1000, False),
    (0.75, 0.5, 200, 4000, False),
    (0.75, 0.5, 1000, 20_000, False),
    (0.75, 0.7, 200, 4000, False),
    (0.75, 0.5, 200, 4000, True),
    (0.85, 0.5, 200, 4000, False),
    (0.5, 0.5, 200, 4000, False),
)


def verdicts(
    draw: np.random.Generator, count: int, agreement: float, wins: float, biased: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts of people and of the judge on the same prompts, 0 or 1."""
    human = draw.random(count) < wins
    if biased:
        # All disagreement is on what people call a loss.
        flipped = ~human & (draw.random(count) < (1 - agreement) / (1 - wins))
    else:
        flipped = draw.random(count) >= agreement
    return human.astype(float), (human ^ flipped).astype(float)


def correlation(agreement: float, wins: float, biased: bool) -> float:
    """φ of people's verdicts and the judge's, from the probabilities of the four cases."""
    wrong_wins = 0.0 if biased else wins * (1 - agreement)
    wrong_losses = 1 - agreement if biased else (1 - wins) * (1 - agreement)
    both = wins - wrong_wins
    its = both + wrong_losses
    return (both - wins * its) / (wins * (1 - wins) * its * (1 - its)) ** 0.5


def main() -> None:
    """Simulate and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=4000, help="of each case")
    runs = parser.parse_args().runs
    rows = []
    for number, (agreement, wins, labels, prompts, biased) in enumerate(CASES):
        draw = np.random.default_rng(number)
        hits = plain_hits = judge_hits = 0
        gains, means, plain_means = [], [], []
        for _ in range(runs):
            human, judge = verdicts(draw, prompts, agreement, wins, biased)
            found = powered_mean(human[:labels], judge[:labels], judge[labels:])
            plain = powered_mean(human[:labels], judge[:labels], [])
            assert found is not None
            assert plain is not None
            hits += abs(found.mean - wins) <= Z90 * found.standard_error
            plain_hits += abs(plain.mean - wins) <= Z90 * plain.standard_error
            judge_hits += abs(judge.mean() - wins) <= Z90 * judge.std(ddof=1) / prompts**0.5
            gains.append(found.effective_labels / labels)
            means.append(found.mean)
            plain_means.append(plain.mean)
        squared = correlation(agreement, wins, biased) ** 2
        rest = prompts - labels
        rows.append(
            [
                f"{agreement:.0%}{', biased' if biased else ''}",
                f"{wins:.0%}",
                f"{labels:,}",
                f"{prompts:,}",
                f"{hits / runs:.1%}",
                f"{plain_hits / runs:.1%}",
                f"{judge_hits / runs:.1%}",
                f"{statistics.mean(gains):.2f}",
                f"{statistics.variance(plain_means) / statistics.variance(means):.2f}",
                f"{1 / (1 - squared * rest / prompts):.2f}",
                f"{1 / (1 - squared):.2f}",
            ]
        )
    error = (0.9 * 0.1 / runs) ** 0.5
    note = (
        f"Synthetic, {runs:,} runs each; coverage of 90 % intervals, with a standard error of "
        f"{error:.1%}. Gain: effective over actual human labels, as estimated in each run; as "
        "the variance, over the runs, of the labels alone by that of ours; in theory "
        "1 / (1 - φ²N/(n+N)) with n labels and N other prompts; and 1 / (1 - φ²) at most. A "
        "judge's labels taken for people's hold the truth only by the luck of errors that cancel "
        "out: see the biased judge, and 70 % of wins."
    )
    header = ["agreement", "wins", "human labels", "prompts", "coverage", "labels alone"]
    header += ["judge alone", "gain", "gain measured", "gain in theory", "bound"]
    write_table("ppi", header, rows, note)


if __name__ == "__main__":
    main()
