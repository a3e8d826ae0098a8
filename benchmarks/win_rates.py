"""Win rates of twelve models on AlpacaEval, raw and at equal lengths, beside the published ones.

    python benchmarks/win_rates.py FOLDER

The folder holds AlpacaEval's `responses.parquet` and `judgments.parquet`: 805 instructions, each
model's answers, and GPT-4-turbo's verdicts on them against the answers of `gpt4_1106_preview`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from table import write_table

from judging.judge import Group
from judging.win_rate import length_controlled_win_rates, win_probabilities, win_rate
from preferences.conversations import imported_candidate, make_prompt
from preferences.estimate import Estimate
from preferences.records import Judgment, Message

BASELINE = "gpt4_1106_preview"
PUBLISHED = {
    BASELINE: (50.0, 50.0),
    "FuseChat-Llama-3.1-8B-Instruct": (63.3, 65.4),
    "claude-2.1": (15.733506736409938, 25.251943886133027),
    "gpt-3.5-turbo-1106_verbose": (12.76316981026087, 22.00093702171442),
    "OpenHermes-2.5-Mistral-7B": (10.340415705751552, 16.248577696674843),
    "gpt-3.5-turbo-1106": (9.177964561962735, 19.30058903498905),
    "vicuna-13b-v1.5": (6.722122014857143, 10.484438298504218),
    "oasst-rlhf-llama-33b": (6.296434785813666, 7.970921837335629),
    "gemma-2b-it": (3.4019714381366457, 5.437453620377121),
    "alpaca-7b": (2.591450540223603, 5.875487163278986),
    "phi-2": (2.350209543026152, 4.398682270855682),
    "falcon-7b-instruct": (2.146617553167702, 4.036937566812824),
}
"""Percent: raw, and length-controlled. From the leaderboard of tatsu-lab/alpaca_eval
(weighted_alpaca_eval_gpt4_turbo); FuseChat's from its model card, to one digit."""
NOTE = (
    "Percent. With 95 % intervals by prompt. Raw: the mean of P(the model's answer is better); "
    "`exact` where it is the published figure to within 1e-9 of a percent, `rounds` where that is "
    "published to one digit. At equal lengths: `judging.length_control` on these eleven models and "
    "their baseline alone. AlpacaEval's own figures also draw on difficulties of prompts that were "
    "fitted to more than a hundred models, and on two models told to be brief and verbose; neither "
    "is in the data. The baseline against itself is one half by definition."
)


def load(folder: Path) -> dict[str, tuple[list[Group], list[Judgment]]]:
    """For each model, its answers beside the baseline's, and the judgments on them."""
    prompts, answers = {}, {}
    for row in pq.read_table(folder / "responses.parquet").to_pylist():
        question = row["instruction"]
        if question not in prompts:
            prompts[question] = make_prompt((Message("user", question),), "responses.parquet", None)
        model = row["generator"]
        answers[question, model] = imported_candidate(prompts[question], model, row["output"])
    found: dict[str, tuple[list[Group], list[Judgment]]] = {}
    for row in pq.read_table(folder / "judgments.parquet").to_pylist():
        question, model = row["instruction"], row["generator"]
        if model == BASELINE:
            continue
        # The first is the baseline's: 1 means that it is certainly better, 2 that the other is.
        shown = (answers[question, row["generator_1"]], answers[question, row["generator_2"]])
        assert shown[0].model == BASELINE
        groups, judgments = found.setdefault(model, ([], []))
        groups.append(Group(prompts[question], shown[::-1]))
        judgments.append(
            Judgment(
                judgment_id=f"{model}/{len(groups)}",
                prompt_id=prompts[question].prompt_id,
                kind="imported",
                judge=row["annotator"],
                candidate_ids=tuple(c.candidate_id for c in shown),
                probability=2 - row["preference"],
            )
        )
    return found


def ranks(values: dict[str, float]) -> dict[str, int]:
    """Places, the highest first."""
    order = sorted(values, key=lambda name: -values[name])
    return {name: place for place, name in enumerate(order, start=1)}


def spearman(one: dict[str, int], other: dict[str, int]) -> float:
    """The correlation of two rankings."""
    return float(np.corrcoef([one[n] for n in one], [other[n] for n in one])[0, 1])


def main() -> None:
    """Compute, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with responses.parquet and judgments.parquet")
    found = load(parser.parse_args().folder)
    started = time.perf_counter()
    wins = {name: win_probabilities(*given) for name, given in found.items()}
    estimates = {name: win_rate(found[name][0], wins[name]) for name in found}
    raw = {name: estimate for name, estimate in estimates.items() if estimate is not None}
    groups = [group for given, _ in found.values() for group in given]
    controlled = length_controlled_win_rates(groups, [w for name in found for w in wins[name]])
    seconds = time.perf_counter() - started
    at_equal = {r.model: r.controlled for r in controlled if r.controlled is not None}
    ours = {name: 100 * estimate.mean for name, estimate in at_equal.items()} | {BASELINE: 50.0}
    published = {name: figures[1] for name, figures in PUBLISHED.items()}
    means = {name: 100 * estimate.mean for name, estimate in raw.items()} | {BASELINE: 50.0}
    effects = {r.model: r.length_effect for r in controlled}
    places = [ranks(means), ranks(ours), ranks(published)]
    rows = []
    for name in places[0]:
        rows.append(
            [
                name,
                percent(raw.get(name)),
                same(means[name], PUBLISHED[name][0]),
                percent(at_equal.get(name)),
                f"{published[name]:.2f}",
                f"{effects[name]:.2f}" if name in effects else "",
                *(str(place[name]) for place in places),
            ]
        )
    off = [abs(ours[name] - published[name]) for name in found]
    off_raw = [abs(means[name] - published[name]) for name in found]
    summary = (
        f"Against the published length-controlled figures of the {len(found)} models, ours differ "
        f"by {np.mean(off):.2f} points in the mean and {max(off):.2f} at most; the raw ones by "
        f"{np.mean(off_raw):.2f} and {max(off_raw):.2f}. Rank correlation with the published "
        f"ranks: {spearman(places[1], places[2]):.3f}; of the raw ones "
        f"{spearman(places[0], places[2]):.3f}. All computed in {seconds:.1f} s."
    )
    header = ["model", "raw", "published raw", "equal lengths", "published", "length effect"]
    header += ["rank raw", "rank equal lengths", "rank published"]
    write_table("win_rates", header, rows, f"{NOTE}\n\n{summary}")


def percent(estimate: Estimate | None) -> str:
    """A win rate with half of its interval; the baseline's, which needs none, without."""
    if estimate is None:
        return "50.00"
    return f"{100 * estimate.mean:.2f} ± {50 * (estimate.high - estimate.low):.2f}"


def same(ours: float, published: float) -> str:
    """The published figure, and whether ours is the same."""
    if abs(ours - published) < 1e-9:
        return f"{published:.2f} exact"
    if round(ours, 1) == published:
        return f"{published:.1f} rounds"
    return f"{published:.2f} DIFFERS"


if __name__ == "__main__":
    main()
