"""How far a learnt reward can be pursued, by how many pairs it was learnt from.

    OMP_NUM_THREADS=2 python benchmarks/over_optimisation.py

After Gao, Schulman and Hilton (2023), on the miniature, where the true reward is known. Reward
models are trained on few and on many pairs of the first policy's answers, whose labels are drawn
from σ(6 × difference of the true rewards). Each is then pursued in two ways: the best of n answers
by it is taken, and PPO trains on it without any price on leaving the first policy. What the reward
model says of the answers rises all the way; the true reward need not.

Nothing stops these runs. The judge that watches over PPO is the true reward here, and the table
says when it would have ended the run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import miniature
import pyarrow as pa
import pyarrow.parquet as pq
from miniature import FOLDER, POLICY, Asked, Said
from plot import COLOURS, Curve, Point, plot
from table import write_table

from preferences.conversations import make_prompt
from preferences.estimate import Estimate
from preferences.export import as_dicts
from preferences.records import Messages
from training import models, reward_head
from training.kl_control import FixedKL
from training.loop import train
from training.ppo import PPOConfig
from training.probe import ProbeConfig
from training.reward import RewardConfig, held_out_accuracy, publish_reward_model
from training.run import TrainingRuntime

RESULTS = Path(__file__).parent / "results"
PAIRS = (30, 100, 300, 1000)
"""Reward models are trained on so many."""
SURENESS = 6.0
"""Logits of a label for a whole unit of the true reward."""
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
PROMPTS, DRAWN = 96, 64
"""Held-out prompts, and answers to each, that the best of n are taken from."""
SHARED: dict[str, Any] = {
    "model": str(POLICY),
    "weights": "lora",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "max_length": 128,
}
REWARD = RewardConfig(**SHARED, learning_rate=1e-3, batch_size=16, max_steps=80, eval_steps=80)
PPO = PPOConfig(
    **SHARED,
    kl=FixedKL(coefficient=0.0),
    learning_rate=1e-3,
    schedule="constant",
    temperature=1.0,
    max_tokens=miniature.MAX_TOKENS,
    rollouts=64,
    batch_size=32,
    passes=2,
    max_steps=40,
    # Probes watch, but never end the run.
    probe=ProbeConfig(
        every=5,
        prompts=192,
        max_tokens=miniature.MAX_TOKENS,
        batch_size=192,
        max_malformed=1.0,
        max_length_rate=1.0,
        min_win_rate=0.0,
        patience=1000,
    ),
)
RUNTIME = TrainingRuntime(log_steps=1)


NOTE = (
    "True rewards with 95 % intervals, clustered by task. What a reward model says is brought to "
    "the mean and the deviation that the true reward has over the first policy's answers. "
)
TIES = (
    "{} held-out prompts with {} answers each. KL of the best of n is log n − (n − 1)/n; ties "
    "among answers make it smaller by less than {:.1g} nats."
)
CAUGHT = (
    "No price on KL, and nothing ends a run; `caught` is the first probe at which the guard "
    "against over-optimisation, with the true reward as its judge, would have counted against it."
)


@dataclass(frozen=True)
class Pursued:
    """How it stands after pursuing a reward model so far."""

    how: str
    kl: float
    """From the first policy, in nats an answer."""
    true: Estimate
    """The mean true reward."""
    said: float
    """What the reward model says, in the true reward's mean and deviation on the first policy."""
    caught: bool = False
    """Whether PPO's guard calls it over-optimised."""


def draw_pairs(policy: Any) -> list[tuple[Said, Said]]:
    """Two of the policy's answers to each of many prompts, differing, in random order."""
    asked = miniature.held_out(FOLDER / "prompts.jsonl")
    said = miniature.say(policy, asked, samples=4)
    pairs = [pair for pair in zip(said[::2], said[1::2], strict=True) if pair[0].ids != pair[1].ids]
    random.Random(0).shuffle(pairs)
    return pairs


def write_pairs(
    folder: Path, split: str, pairs: Sequence[tuple[Said, Said]], sureness: float
) -> float:
    """Pairs as a dataset's split, labelled so surely; returns the share whose label is that of the
    true reward, ties left out."""
    chance, rows, right = random.Random(1), [], []
    for number, (one, other) in enumerate(pairs):
        first = 0.5 + 0.5 * math.tanh(sureness * (one.reward - other.reward) / 2)
        chosen, rejected = (one, other) if chance.random() < first else (other, one)
        if one.reward != other.reward:
            right.append(chosen.reward > rejected.reward)
        answers = {"chosen": chosen.text, "rejected": rejected.text}
        rows.append(
            {
                "prompt": as_dicts(one.asked.prompt.messages),
                **{k: [{"role": "assistant", "content": v}] for k, v in answers.items()},
                "prompt_id": one.asked.tokens.prompt_id,
                "chosen_id": f"{number}a",
                "rejected_id": f"{number}b",
                "probability": 1.0,
            }
        )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000.parquet")
    return fmean(right)


def rewards_of(model: Path, said: Sequence[Said]) -> list[float]:
    """What a published reward model says of answers."""
    from transformers import AutoModelForSequenceClassification

    with models.quiet_libraries():
        loaded = AutoModelForSequenceClassification.from_pretrained(model).eval()
    reward_head.read_at_ends(loaded, packing=False)
    return reward_head.rewards(loaded, [[*s.asked.tokens.ids, *s.ids] for s in said], 256)


def best_of(said: Sequence[Said], scores: Sequence[float]) -> list[Pursued]:
    """The best of n by the scores, expected over all draws of n from a prompt's `DRAWN` answers.

    That of rank i, counted from the worst, is the best of C(i − 1, n − 1) out of C(DRAWN, n) draws.
    KL is log n − (n − 1)/n, which is exact where no answer is likely enough to tie with itself;
    `ties` says how nearly.
    """
    order = [
        sorted(range(start, start + DRAWN), key=lambda i: scores[i])
        for start in range(0, len(said), DRAWN)
    ]
    found = []
    for n in BEST_OF:
        draws = math.comb(DRAWN, n)
        weights = [math.comb(i, n - 1) / draws for i in range(DRAWN)]
        true, by_model = (
            [
                math.fsum(w * values[i] for w, i in zip(weights, ranks, strict=True))
                for ranks in order
            ]
            for values in ([one.reward for one in said], scores)
        )
        tasks = [said[ranks[0]].asked.task for ranks in order]
        kl = math.log(n) - (n - 1) / n
        found.append(Pursued(f"best of {n}", kl, miniature.mean(tasks, true), fmean(by_model)))
    return found


def ties(policy: Any, drawn: Sequence[Said]) -> float:
    """By how many nats ties could make the KL of the best of most smaller.

    Within an answer of probability p the best of n is spread as n·uⁿ⁻¹ is over so much of u, and a
    tie makes that even: ((n − 1)·p)²/24 nats for small p, here of the likeliest answer drawn.
    """
    likeliest = math.exp(max(miniature.log_probs(policy, drawn)))
    return ((max(BEST_OF) - 1) * likeliest) ** 2 / 24


def pursue(
    reward_model: Path,
    dataset: Path,
    output: Path,
    asked: Sequence[Asked],
    unit: tuple[float, float],
) -> list[Pursued]:
    """What PPO makes of a reward model, probe by probe; `reward_model` is its run, `unit` the mean
    and the deviation of the true reward on the first policy."""
    worth = {one.tokens.prompt_id: one for one in asked}
    config = PPO.model_copy(update={"reward_model": str(reward_model)})
    result = train(config, dataset, output, RUNTIME, scorer=_wins, progress=_silent)
    steps = [line for line in _lines(output / "metrics.jsonl") if "kl" in line]
    samples = _lines(output / "samples.jsonl")
    found = []
    for probe in result.probes:
        said = [line for line in samples if line["step"] == probe.step]
        places = [worth[line["prompt_id"]] for line in said]
        true = [
            miniature.true_reward(one.prompt, line["response"])
            for one, line in zip(places, said, strict=True)
        ]
        # The step after the probe samples the policy that was probed; its neighbours steady it.
        near = [line for line in steps if abs(line["step"] - probe.step - 1) <= 1]
        found.append(
            Pursued(
                f"PPO, step {probe.step}",
                fmean(line["kl"] for line in near) if probe.step else 0.0,
                miniature.mean([one.task for one in places], true),
                unit[0] + unit[1] * (fmean(line["score"] for line in near) if probe.step else 0.0),
                "over-optimised" in (probe.breach or ""),
            )
        )
    return found


def _wins(
    prompts: Sequence[Messages], responses: Sequence[str], references: Sequence[str]
) -> list[float]:
    """The true reward as a judge."""
    asked = [make_prompt(messages, "held-out prompt") for messages in prompts]
    gaps = [
        miniature.true_reward(prompt, ours) - miniature.true_reward(prompt, theirs)
        for prompt, ours, theirs in zip(asked, responses, references, strict=True)
    ]
    return [0.5 + 0.5 * ((gap > 0) - (gap < 0)) for gap in gaps]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _silent(*_: Any) -> None:
    """Tells nothing."""


def main() -> None:
    """Train reward models, pursue them, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a folder for runs, which go on from there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        experiment(arguments.work or Path(folder))


def experiment(work: Path) -> None:
    """All of it, in a folder."""
    first = miniature.load_policy(str(POLICY))
    asked = miniature.held_out()
    pairs, some = draw_pairs(first), random.Random(0).sample(asked, PROMPTS)
    new = miniature.say(first, asked, samples=2, seed=1)
    tests = list(zip(new[::2], new[1::2], strict=True))
    drawn = miniature.say(first, some, samples=DRAWN, seed=2)
    truth = [one.reward for one in drawn]
    unit = fmean(truth), pstdev(truth)
    facts: dict[int, list[str]] = {}
    chosen: dict[int, list[Pursued]] = {}
    for n in PAIRS:
        data, run = work / f"pairs-{n}", work / f"reward-{n}"
        right = write_pairs(data, "train", pairs[:n], SURENESS)
        write_pairs(data, "test", tests, 1e9)
        train(REWARD, data, run, progress=_silent)
        accuracy = held_out_accuracy(REWARD, run, data).accuracy
        facts[n] = [f"{n:,}", f"{right:.3f}", str(accuracy)]
        scores = rewards_of(publish_reward_model(REWARD, run), drawn)
        chosen[n] = best_of(drawn, in_true_units(scores, unit))
    write_table(
        "over_optimisation_best_of_n",
        ["pairs", "labels right", "model right", *(p.how for p in chosen[PAIRS[0]]), "it says"],
        [
            [*facts[n], *(str(p.true) for p in chosen[n]), f"{chosen[n][-1].said:.3f}"]
            for n in PAIRS
        ],
        NOTE + TIES.format(PROMPTS, DRAWN, ties(first, drawn)),
    )
    draw("best_of_n", chosen, "The best of n answers by a reward model")
    everything = work / f"pairs-{max(PAIRS)}"
    learnt = {
        n: pursue(work / f"reward-{n}", everything, work / f"ppo-{n}", asked, unit) for n in PAIRS
    }
    write_table(
        "over_optimisation_ppo",
        ["pairs", "best", "at KL", "at the end", "at KL", "it says", "caught"],
        [[f"{n:,}", *told(learnt[n])] for n in PAIRS],
        NOTE + CAUGHT,
    )
    draw("ppo", learnt, "PPO on a reward model")


def in_true_units(scores: Sequence[float], unit: tuple[float, float]) -> list[float]:
    """Scores of the first policy's answers brought to a mean and a deviation."""
    mean, deviation = fmean(scores), pstdev(scores)
    return [unit[0] + unit[1] * (score - mean) / deviation for score in scores]


def told(learnt: Sequence[Pursued]) -> list[str]:
    """What became of a run of PPO: at its best, at its end, and when the guard saw it."""
    best, end = max(learnt, key=lambda p: p.true.mean), learnt[-1]
    caught = next((p.how.removeprefix("PPO, ") for p in learnt if p.caught), "no")
    return [
        *(str(best.true), f"{best.kl:.1f}"),
        *(str(end.true), f"{end.kl:.1f}", f"{end.said:.3f}", caught),
    ]


def draw(name: str, curves: Mapping[int, Sequence[Pursued]], title: str) -> None:
    """Write the picture of true rewards, and of what the reward models say, against KL."""
    drawn = []
    for colour, (n, points) in zip(COLOURS, curves.items(), strict=False):
        true = [Point(p.kl, p.true.mean, p.true.low, p.true.high) for p in points]
        said = [Point(p.kl, p.said) for p in points]
        drawn += [
            Curve(f"{n:,} pairs: true reward", true, colour),
            Curve("as the reward model says", said, colour, dashed=True),
        ]
    picture = plot(drawn, "KL from the first policy, nats an answer", "reward", title)
    (RESULTS / f"over_optimisation_{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
