"""A reward model trained with shared prompts is the one trained with an answer in every row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.architectures import ARCHITECTURES, a_batch, a_model, apart
from tests.training.conftest import QUICK, saved_weights, silent
from tests.training.test_shared_training import loss_and_metrics, moved_away
from training import reward, reward_head
from training.adapters import LoraConfig
from training.loop import train
from training.models import load_tokenizer
from training.reward import RewardConfig
from training.run import TrainingRuntime
from training.shared_attention import NAME
from training.shared_prefix import why_not

MakeConfig = Callable[..., RewardConfig]


@pytest.fixture
def reward_config(model: str) -> MakeConfig:
    return lambda **changes: RewardConfig(**{**QUICK, "model": model, **changes})


def trainer_for(config: RewardConfig, dataset: Path, output: Path) -> Any:
    pairs, _ = reward.load_data(config, dataset, load_tokenizer(config.model, None))
    assert pairs is not None
    return reward.build_trainer(config, TrainingRuntime(), output, pairs, None)


def classifier(config: str) -> Any:
    """Random, of one output, and read at ends."""
    import transformers

    shape = a_model(config).config
    shape.num_labels = 1
    make: Any = transformers.AutoModelForSequenceClassification.from_config
    model = make(shape)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15)
    reward_head.read_at_ends(model, packing=False)
    return model.train()


def sequences() -> list[list[int]]:
    """Pairs of all kinds, the chosen answers first."""
    batch = a_batch()
    return [
        row[real.bool()].tolist()
        for row, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def read(model: Any, batch: reward_head.Batch) -> tuple[Any, dict[str, Any]]:
    """The rewards, and the gradients of a sum of them that are weighed differently each."""
    model.zero_grad()
    rewards = model(**batch.tensors()).logits[:, 0]
    draw = torch.Generator().manual_seed(2)
    (rewards * torch.randn(rewards.shape, generator=draw)).sum().backward()
    return rewards.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("config", ARCHITECTURES)
def test_every_architecture_gives_the_rewards_of_answers_alone_and_their_gradients(
    config: str, checkpointing: bool
) -> None:
    model = classifier(config)
    assert why_not(model) is None
    expected, gradients = read(model, reward_head.one_a_row(sequences()))
    model.set_attn_implementation(NAME)
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = reward_head.shared_pairs(sequences())
    assert batch.input_ids.shape[1] < 0.75 * sum(map(len, sequences()))
    rewards, ours = read(model, batch)
    assert (rewards - expected).abs().max() < 1e-5
    assert expected.std() > 0.1
    assert apart(ours, gradients) < 1e-6
    # Batches of other kinds are read as before.
    again, theirs = read(model, reward_head.one_a_row(sequences()))
    assert (again - expected).abs().max() < 1e-5
    assert apart(theirs, gradients) < 1e-6


@pytest.mark.parametrize("fault", ["end", "segments"])
def test_a_planted_fault_is_seen(fault: str) -> None:
    model = classifier("LlamaConfig")
    expected, _ = read(model, reward_head.one_a_row(sequences()))
    model.set_attn_implementation(NAME)
    batch = reward_head.shared_pairs(sequences())
    segments = batch.segments
    assert segments is not None
    if fault == "end":  # one token before it
        batch = replace(batch, ends=batch.ends - 1)
    else:  # a token of the chosen answer is seen
        seen = tuple(n + (n > 0) for n in segments.shared)
        batch = replace(batch, segments=replace(segments, shared=seen, masks={}))
    assert (read(model, batch)[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "full"},
        {"weights": "qlora"},
        {"labels": "soft", "margin": 0.5, "balance": "prompts"},
        pytest.param({"weights": "dora"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_loss_and_all_metrics_are_the_same(
    changes: dict[str, Any], reward_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    found = []
    for packing in (False, True):
        config = reward_config(packing=packing, **changes)
        trainer = trainer_for(config, red_pairs, tmp_path / str(packing))
        moved_away(trainer)
        found.append(loss_and_metrics(trainer))
    (expected, metrics), (loss, told) = found
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert told.keys() == metrics.keys()
    assert told == pytest.approx(metrics, rel=1e-5, abs=1e-5)


def test_twenty_steps_end_with_the_same_weights_and_the_same_log(
    reward_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    # Adam makes a whole step of a gradient that is all but zero, so steps are small ones.
    changes = {"max_steps": 20, "eval_steps": 20, "learning_rate": 5e-5}
    runtime = TrainingRuntime(log_steps=1, save_steps=20)
    weights, logs = [], []
    for packing in (False, True):
        config = reward_config(packing=packing, gradient_checkpointing=True, **changes)
        run = tmp_path / str(packing)
        weights.append(saved_weights(run, train(config, red_pairs, run, runtime, progress=silent)))
        logs.append([json.loads(line) for line in (run / "metrics.jsonl").open()])
    assert apart(weights[1], weights[0]) < 1e-6
    assert len(logs[0]) == len(logs[1]) >= 20
    for theirs, mine in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    margins = [line["rewards/margins"] for line in logs[1] if "rewards/margins" in line]
    assert max(margins) - min(margins) > 0.01  # it did train


def test_where_sharing_would_not_be_exact_answers_are_packed_and_it_is_said_why(
    reward_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    shapes, said = [], []
    for dropout in (0.0, 0.1):
        config = reward_config(lora=LoraConfig(dropout=dropout))
        trainer = trainer_for(config, red_pairs, tmp_path)
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
        shapes.append("segments" in batch)
        said.append(trainer.forward_pass)
    assert shapes == [True, False]
    assert said == [
        "shared: each prompt once, no padding",
        "packed, with repeated prompts: dropout draws anew for every row",
    ]
