"""Rankings of many small groups: seconds a million, memory, and other solvers' on the same data.

    pip install choix==0.4.1
    OMP_NUM_THREADS=1 python benchmarks/solver.py

Six candidates a group, all pairs in both orders: 30 calls by one judge. Ours gives means and the
whole covariance, for verdicts (Davidson ties, first-place bias, Newton) and for log-odds (closed
form). choix gives means, by LSR from the matrix of wins. Groups are solved 4,000 at a time, each
million by two processes of one thread; making up the data is not timed.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

import numpy as np
from table import peak_gib, write_table

from judging.noise import Calls, JudgeNoise, Noise, pairs, posterior

SIZE, BATCH = 6, 4000
NOISE = Noise({"judge": JudgeNoise(1.0, 0.3, 1.3, -2.0)}, 0.3, 2.0)
REPEATS = 5


def drawn(groups: int, is_soft: bool, seed: int) -> Calls:
    """Calls about groups with N(0, 2) qualities."""
    generator = np.random.default_rng(seed)
    first, second = pairs(SIZE)
    theta = generator.normal(0, 2**0.5, (groups, SIZE))
    eta = (theta[:, first] - theta[:, second]).ravel()
    sign = np.repeat([1.0, -1.0], len(eta))
    value = sign * np.tile(eta, 2) + 0.3 + generator.logistic(0, 1, len(sign))
    count = len(sign)
    return Calls(
        groups=groups,
        size=SIZE,
        cell=np.tile(np.arange(len(eta)), 2),
        sign=sign,
        judge=np.zeros(count, np.int64),
        value=value if is_soft else np.sign(value),
        is_soft=np.full(count, is_soft),
        has_order=np.ones(count, np.bool_),
        weight=np.ones(count),
        freedom=np.ones(count),
        judges=("judge",),
    )


def solve_many(groups: int, is_soft: bool, seed: int) -> tuple[float, float]:
    """Seconds for so many groups in this process, and its peak of memory in GiB."""
    batches = [drawn(BATCH, is_soft, seed + n) for n in range(4)]
    posterior(batches[0], NOISE)
    taken = 0.0
    for number in range(groups // BATCH):
        started = time.perf_counter()
        found = posterior(batches[number % len(batches)], NOISE)
        taken += time.perf_counter() - started
        assert np.isfinite(found.covariance).all()
    return taken, peak_gib()


def choix_seconds(solver: str, groups: int) -> float | None:
    """Of choix for each group; None where it is not installed."""
    try:
        choix = import_module("choix")
    except ImportError:
        return None
    calls = drawn(groups, False, 0)
    first, second = pairs(SIZE)
    wins = np.zeros((groups, SIZE, SIZE))
    group, pair = np.divmod(calls.cell, len(first))
    low = calls.sign * calls.value > 0
    winner, loser = (
        np.where(low, first[pair], second[pair]),
        np.where(low, second[pair], first[pair]),
    )
    np.add.at(wins, (group, winner, loser), 1)
    started = time.perf_counter()
    for matrix in wins:
        if solver == "lsr_dense":
            choix.lsr_pairwise_dense(matrix, alpha=0.01)
        else:
            data = [
                (i, k) for i in range(SIZE) for k in range(SIZE) for _ in range(int(matrix[i, k]))
            ]
            choix.opt_pairwise(SIZE, data, alpha=0.5)
    return (time.perf_counter() - started) / groups


def difference_from_choix(groups: int) -> str:
    """The largest from choix's `opt` on means, where its model and ours are the same: no ties, no
    bias, nothing common to a pair's calls, and its penalty α Σθ² our prior's Σθ² / 2v."""
    choix = import_module("choix")
    plain = Noise({"judge": JudgeNoise(1.0, 0.0, 1.0, -60.0)}, 1e-15, 2.0)
    calls = drawn(groups, False, 9)
    found = posterior(calls, plain).mean
    first, second = pairs(SIZE)
    worst = 0.0
    for group in range(groups):
        mine = calls.cell // len(first) == group
        pair, ahead = calls.cell[mine] % len(first), (calls.sign * calls.value)[mine] > 0
        data = [
            (int(a), int(b)) if won else (int(b), int(a))
            for a, b, won in zip(first[pair], second[pair], ahead, strict=True)
        ]
        other = choix.opt_pairwise(SIZE, data, alpha=0.25, tol=1e-12)
        worst = max(worst, float(np.abs(found[group] - (other - other.mean())).max()))
    return f"Means differ from choix opt's under the same model by {worst:.1e} at most."


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=1_000_000)
    arguments = parser.parse_args()
    rows = []
    for name, is_soft in (("verdicts", False), ("log-odds", True)):
        each = []
        for repeat in range(REPEATS):
            batch = drawn(BATCH, is_soft, repeat)
            started = time.perf_counter()
            posterior(batch, NOISE)
            each.append((time.perf_counter() - started) / BATCH * 1e6)
        with ProcessPoolExecutor(2) as pool:
            halves = [pool.submit(solve_many, arguments.groups // 2, is_soft, n) for n in (0, 100)]
            taken = [half.result() for half in halves]
        rows.append(
            [
                f"ours, {name}, with covariance",
                f"{np.median(each):.1f} ({min(each):.1f}-{max(each):.1f})",
                f"{max(t for t, _ in taken):.1f}",
                f"{sum(m for _, m in taken):.2f}",
            ]
        )
        print(rows[-1], flush=True)
    for solver, groups in (("lsr_dense", 2000), ("opt", 200)):
        times = [choix_seconds(solver, groups) for _ in range(REPEATS)]
        known = [t * 1e6 for t in times if t is not None]
        if known:
            spread = f"{np.median(known):.1f} ({min(known):.1f}-{max(known):.1f})"
            rows.append([f"choix {solver}, means", spread, "", ""])
            print(rows[-1], flush=True)
    note = f"Medians of {REPEATS}, with the least and the most."
    if len(rows) > 2:
        note += " " + difference_from_choix(100)
    header = ["solver", "µs a group, one thread", f"s for {arguments.groups:,}, two", "GiB, both"]
    write_table("solver", header, rows, note)


if __name__ == "__main__":
    main()
