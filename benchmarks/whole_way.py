"""The whole way on the miniature: is every method's model really better, and how far did it go?

    OMP_NUM_THREADS=2 python benchmarks/whole_way.py

`pairwright build` makes the miniature recipe's dataset from its judge, which errs; no training sees
a true reward. Each method trains the first policy on it with several prices on leaving it, or for
several lengths; DPO also goes on from SFT's model, and a second round builds a dataset from the
first round's model and trains that on it. Then all models answer the held-out prompts, and the true
reward says what they are worth, paired with what each started from.

Settings were chosen on prompts that are neither in the dataset nor reported here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import miniature
from miniature import POLICY, Measured
from plot import COLOURS, Curve, Point, plot
from pydantic import TypeAdapter
from table import write_table

from training.loop import train
from training.merge import merge
from training.methods import Alignment
from training.models import saved_folder
from training.settings import TrainingConfig

RESULTS = Path(__file__).parent / "results"
PROMPTS = 240
"""In each round's dataset."""
FIRST = "first policy"
SHARED: dict[str, Any] = {
    "weights": "lora",
    "lora": {"rank": 16, "alpha": 32},
    "batch_size": 16,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "max_length": 128,
    "eval_steps": 1000,
    "probe": None,  # every model is looked at here
}


@dataclass(frozen=True)
class Way:
    """A method, where it starts, and the settings that take it so far."""

    name: str
    start: str
    """The way and the setting whose model it starts from, or `FIRST`."""
    method: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]
    """By what the table calls them."""
    round: int = 1
    """Whose dataset it learns from."""


SFT, DPO = "SFT on the best of six", "DPO"
PAIRWISE = {"method": "dpo", "learning_rate": 5e-4, "max_steps": 30}
PRICES = {"β 0.5": {"beta": 0.5}, "β 0.1": {"beta": 0.1}}
WAYS = (
    Way(
        SFT,
        FIRST,
        {"method": "sft", "learning_rate": 1e-3},
        {"20 steps": {"max_steps": 20}, "60 steps": {"max_steps": 60}},
    ),
    Way("SFT, then DPO", f"{SFT}, 60 steps", PAIRWISE, PRICES),
    Way(DPO, FIRST, PAIRWISE, PRICES | {"β 0.5, 60 steps": {"beta": 0.5, "max_steps": 60}}),
    Way("DPO, second round", f"{DPO}, β 0.5", PAIRWISE, PRICES, round=2),
    Way(
        "ORPO",
        FIRST,
        {"method": "orpo", "learning_rate": 1e-3, "odds_ratio_weight": 0.5},
        {"15 steps": {"max_steps": 15}, "40 steps": {"max_steps": 40}},
    ),
    Way("KTO", FIRST, {"method": "kto", "learning_rate": 1e-3, "max_steps": 30}, PRICES),
    Way(
        "reward model + PPO",
        FIRST,
        {
            "method": "ppo",
            "learning_rate": 1e-3,
            "max_steps": 30,
            "batch_size": 64,
            "rollouts": 64,
            "passes": 2,
            "temperature": 1.0,
            "max_tokens": miniature.MAX_TOKENS,
        },
        {
            "β 0.5": {"kl": {"kind": "fixed", "coefficient": 0.5}},
            "β 0.1": {"kl": {"kind": "fixed", "coefficient": 0.1}},
        },
    ),
)
REWARD = {"method": "reward", "learning_rate": 1e-3, "max_steps": 100}
"""The reward model that PPO pursues."""


@dataclass(frozen=True)
class Trained:
    """A model and what it is worth."""

    way: str
    setting: str
    start: str
    measured: Measured
    seconds: float
    """Of training."""


def main() -> None:
    """Build, train, measure, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a folder for store and runs, to go on from")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        found = travel(work.resolve())
    write_table("whole_way", HEADER, rows_of(found), NOTE)
    (RESULTS / "whole_way.svg").write_text(drawing(found), encoding="utf-8")


def travel(work: Path) -> dict[str, Trained]:
    """All ways, by way and setting."""
    asked, first = miniature.held_out(), miniature.load_policy(str(POLICY))
    found = {FIRST: Trained(FIRST, "", FIRST, miniature.measure(first, first, asked), 0.0)}
    places, datasets = {FIRST: POLICY}, {}
    for way in WAYS:
        start = places[way.start]
        if way.round not in datasets:
            datasets[way.round] = miniature.build(work, f"round-{way.round}", PROMPTS, start)
        for setting, changes in way.settings.items():
            name = f"{way.name}, {setting}"
            output = work / "runs" / name.replace(" ", "-").replace(",", "")
            given = dict(way.method) | dict(changes)
            began = time.process_time()
            if way.method["method"] == "ppo":
                given["reward_model"] = str(reward_model(work, datasets[way.round]))
            config = configured(start, given)
            train(config, datasets[way.round], output, progress=_silent)
            seconds = time.process_time() - began
            policy = miniature.trained_policy(config, output)
            measured = miniature.measure(policy, first, asked)
            found[name] = Trained(way.name, setting, way.start, measured, seconds)
            print(f"{name}: {measured.reward}, KL {measured.distance}, {seconds:.0f} s", flush=True)
            if any(name == other.start for other in WAYS):
                adapter = output / saved_folder(config.weights)
                places[name] = merge(
                    str(start), adapter, work / "merged" / name, "float32", card=""
                )
    return found


def configured(model: Path, given: Mapping[str, Any]) -> TrainingConfig:
    """A configuration, read as a recipe's `alignment` is."""
    config: TrainingConfig = TypeAdapter(Alignment).validate_python(
        SHARED | {"model": str(model)} | dict(given)
    )
    return config


def reward_model(work: Path, dataset: Path) -> Path:
    """The run of the reward model, trained once."""
    output = work / "runs" / "reward"
    train(configured(POLICY, REWARD), dataset, output, progress=_silent)
    return output


HEADER = [
    "way",
    "setting",
    "true reward",
    "better than its start by",
    "KL",
    "malformed",
    "CPU seconds",
]
NOTE = (
    f"192 held-out prompts, {miniature.SAMPLES} answers each at temperature 1. Intervals are 95 %, "
    "clustered by the 32 tasks behind the prompts; gains are paired by prompt. KL is from the "
    "first policy, in nats an answer, over the model's own answers. CPU seconds are those of "
    "training; PPO's first has the reward model's in it."
)


def rows_of(found: Mapping[str, Trained]) -> list[list[str]]:
    """The table."""
    rows = []
    for one in found.values():
        measured, start = one.measured, found[one.start].measured
        itself = one.way == FIRST
        rows.append(
            [
                one.way,
                one.setting,
                str(measured.reward),
                "" if itself else str(measured.gain(start)),
                "0" if itself else str(measured.distance),
                f"{measured.malformed:.1%}",
                "" if itself else f"{one.seconds:.0f}",
            ]
        )
    return rows


def drawing(found: Mapping[str, Trained]) -> str:
    """True reward against KL, each way from its start."""
    curves = []
    for way, colour in zip(WAYS, COLOURS, strict=False):
        ours = [one for one in found.values() if one.way == way.name]
        places = sorted((_point(one.measured) for one in ours), key=lambda point: point.x)
        curves.append(Curve(way.name, [_point(found[way.start].measured), *places], colour))
    return plot(
        curves,
        "KL from the first policy, nats an answer",
        "true reward on held-out prompts",
        "The whole way on the miniature",
    )


def _point(measured: Measured) -> Point:
    reward = measured.reward
    return Point(measured.distance.mean, reward.mean, reward.low, reward.high)


def _silent(*_: Any) -> None:
    """Tells nothing."""


if __name__ == "__main__":
    main()
