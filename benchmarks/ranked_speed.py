"""A step on K ranked answers of a prompt in one packed row, against TRL's on K rows and on pairs.

    OMP_NUM_THREADS=1 python benchmarks/ranked_speed.py

The model, the LoRA, the lengths and the seconds are those of `dpo_speed.py`. Contenders take a step
on the same lists of four answers in turn, with the mean of the six pairs' sigmoid losses: ours; the
same loss through TRL's forward pass on a row an answer; and TRL's trainer on the six pairs, in
which every answer stands three times. TRL's are shown as they are on a CPU, and with the logits of
answers' tokens alone, as on a GPU. The reference's log-probabilities are at hand; to compute them
takes the same forward passes. Before, losses are compared.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
from typing import Any
from unittest import mock

import torch
from dpo_speed import (
    SPREAD,
    WORKLOADS,
    Contender,
    Workload,
    answers_only,
    over,
    seconds,
    spread,
    trainer_of,
)
from table import write_table

K = 4
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
LISTS = dict(zip(WORKLOADS, (2, 3, 3), strict=True))
"""In a batch, about as many rows as `dpo_speed.py` has."""


def lists_of(workload: Workload, number: int, seed: int) -> list[dict[str, Any]]:
    """So many prompts with four answers each, the best first."""
    drawn = zip(workload.rows(2 * seed), workload.rows(2 * seed + 1), strict=True)
    better, worse = zip(*itertools.combinations(range(K), 2), strict=True)
    certain = {"probability": [1.0] * len(better), "margin": [0.0] * len(better)}
    return [
        {
            "prompt_ids": one["prompt_ids"],
            "answers_ids": [row[f"{a}_ids"] for row in (one, two) for a in ("chosen", "rejected")],
            "better": better,
            "worse": worse,
            **certain,
        }
        for one, two in itertools.islice(drawn, number)
    ]


def pairs_of(lists: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Six rows of each list, as TRL reads them."""
    return [
        {
            "prompt_ids": each["prompt_ids"],
            "chosen_ids": each["answers_ids"][better],
            "rejected_ids": each["answers_ids"][worse],
        }
        for each in lists
        for better, worse in zip(each["better"], each["worse"], strict=True)
    ]


def contenders(folder: str) -> list[Contender]:
    """Ours, TRL's forward pass on a row an answer, and TRL's trainer on pairs."""
    from training.labels import PairTrainer
    from training.ranked_trainer import RankedTrainer

    ranked = functools.partial(RankedTrainer, "sigmoid", K)
    ours = _contender("ours", trainer_of(ranked, folder))
    if not ours.trainer.forward_pass.startswith("shared"):
        raise SystemExit(f"prompts are not shared: {ours.trainer.forward_pass}")
    with mock.patch("training.shared_prefix.why_not", return_value="it is measured"):
        rows = _contender("TRL, 4 rows", trainer_of(ranked, folder))
    pairs = _contender("TRL, 6 pairs", trainer_of(PairTrainer, folder))
    made = [ours]
    for each in (rows, pairs):
        name = f"{each.name}, answers' logits"
        made += [each, Contender(name, each.trainer, each.optimizer, compact=True)]
    return made


def _contender(name: str, trainer: Any) -> Contender:
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return Contender(name, trainer, torch.optim.AdamW(trained, lr=1e-6))


def batch_of(one: Contender, lists: list[dict[str, Any]]) -> dict[str, Any]:
    """As the contender's collator makes it."""
    rows = pairs_of(lists) if "pairs" in one.name else lists
    made: dict[str, Any] = one.trainer.data_collator(rows)
    return made


def require_equal(running: list[Contender], lists: list[dict[str, Any]]) -> None:
    """All contenders have the same loss, so they do the same work."""
    losses = []
    for one in running:
        # As drawn, a LoRA changes nothing.
        torch.manual_seed(1)
        for name, parameter in one.trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        one.trainer.precompute_ref_logps = False
        with answers_only(one.compact):
            loss = one.trainer.compute_loss(one.trainer.model, batch_of(one, lists))
        losses.append(float(loss.detach()))
    if max(losses) - min(losses) > 1e-4:
        raise SystemExit(f"losses differ: {losses}")


def measure(workload: Workload, running: list[Contender], found: list[list[float]]) -> None:
    """Seconds a list on another batch, which all contenders take in turn."""
    lists = lists_of(workload, LISTS[workload], len(found[0]))
    listed = batch_of(running[0], lists)
    best, others = running[0].reference(listed)
    ranked = torch.cat([best[None], others.T]).T.flatten()
    # Of the pairs of one list after another, with answers as places in all lists' answers.
    better, worse = (
        torch.tensor([n * K + place for n, each in enumerate(lists) for place in each[side]])
        for side in ("better", "worse")
    )
    for one, seconds_each in zip(running, found, strict=True):
        pairs = "pairs" in one.name
        told = (ranked[better], ranked[worse]) if pairs else (best, others)
        batch = batch_of(one, lists) if pairs else listed
        at_hand = {**batch, **dict(zip(REFERENCES, told, strict=True))}
        seconds_each.append(seconds(one.step, at_hand) / len(lists))


def tell(found: dict[Workload, list[list[float]]], running: list[Contender]) -> None:
    """Write the table of what is measured so far."""
    rows = [
        [str(workload), *map(spread, each), *(over(theirs, each[0]) for theirs in each[1:])]
        for workload, each in found.items()
        if each[0]
    ]
    header = [
        "prompt/answer",
        *(f"{one.name}, s a list" for one in running),
        *(f"{one.name} / ours" for one in running[1:]),
    ]
    repeats = len(found[WORKLOADS[0]][0])
    note = (
        f"Batches of 2, 3 and 3 lists of {K} answers. Medians of {repeats} batches, with the least "
        "and the most; ratios are a batch's own. Lengths of prompts and of answers are lognormal "
        f"with the mean given and σ {SPREAD}."
    )
    write_table("ranked_speed", header, rows, note)


def main() -> None:
    """Measure; the table is written after each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="batches of each workload")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        running = contenders(folder)
        require_equal(running, lists_of(Workload(40, 20, 4), 3, 0))
        for one in running:
            one.step(batch_of(one, lists_of(Workload(16, 8, 1), 1, 0)))
        found: dict[Workload, list[list[float]]] = {w: [[] for _ in running] for w in WORKLOADS}
        for _ in range(repeats):
            for workload, each in found.items():
                measure(workload, running, each)
                tell(found, running)


if __name__ == "__main__":
    main()
