"""RLOO ends where theory says, through the real trainer: its optimum is PPO's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import tabular
from tests.training.conftest import saved_weights, silent
from training.group_relative import RLOOConfig
from training.rewarded import train
from training.rollouts import Answer


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("charged", "arrives"), [(0.3, True), (0.6, False)])
def test_the_optimum_is_reached_and_with_a_doubled_beta_does_not(
    charged: float, arrives: bool, tmp_path: Path
) -> None:
    """π* ∝ π_ref·exp(r/0.3), on a language model that is a table, sampled from outside."""
    temperature = 0.7
    start = tabular.random_table(0)
    pairs = tabular.write_pairs(tmp_path / "pairs", [("red", "blue")])

    def draw(policy: Path, prompts: Sequence[Any], *, seed: int, **_: Any) -> list[Answer]:
        weight = load_file(policy / "model.safetensors")["lm_head.weight"]
        said = tabular.log_probs(tabular.read_table(weight) / temperature)
        chances = torch.tensor([math.exp(said[answer]) for answer in tabular.ANSWERS])
        noise = torch.Generator().manual_seed(seed)
        found = torch.multinomial(chances, len(prompts), replacement=True, generator=noise)
        steps = [tabular.steps(tabular.ANSWERS[i]) for i in found.tolist()]
        return [Answer(tuple(token for _, token in each), finished=True) for each in steps]

    config = RLOOConfig(
        model=tabular.write_table(tmp_path / "table", start),
        weights="full",
        reward_functions={"true": "world.py:reward"},
        temperature=temperature,
        beta=charged,
        max_tokens=4,
        max_length=32,
        samples=8,
        rollouts=512,
        batch_size=512,
        max_steps=250,
        learning_rate=0.1,
        dtype="float32",
        gradient_checkpointing=False,
        probe=None,
    )
    run, true = tmp_path / "run", {"true": lambda messages, answer: tabular.REWARD[answer]}
    result = train(config, pairs, run, progress=silent, functions=true, sampler=draw)
    learnt = tabular.read_table(saved_weights(run, result)["lm_head.weight"])
    reference = tabular.log_probs(start / temperature)
    far = tabular.kl(tabular.log_probs(learnt / temperature), tabular.optimum(reference, 0.3))
    # Where one policy is e^ε times as sure of everything as the other, KL is about ε²/2: 0.004 is
    # an error of 9 % in the probabilities.
    assert far <= 0.004 if arrives else far > 0.1
