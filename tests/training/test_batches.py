"""Batches by tokens hold what they may, and train what batches by number train."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tests.training.architectures import apart
from tests.training.conftest import (
    COLOURS,
    QUICK,
    THINGS,
    Pair,
    saved_weights,
    silent,
    write_split,
)
from tests.training.test_resume import Stop, assert_same_run
from training import batches, dpo, shared_prefix
from training.batches import Size, evenly, padded, size_of, sizes_of
from training.dpo import DPOConfig
from training.loop import train
from training.methods import Alignment, method_of
from training.models import load_tokenizer
from training.run import TrainingRuntime
from training.settings import TrainingConfig

EVERY = TrainingRuntime(log_steps=1, save_steps=1)

SIZES = st.lists(
    st.builds(size_of, st.integers(1, 90), st.lists(st.integers(1, 90), min_size=1, max_size=4)),
    max_size=40,
)


def summed(sizes: list[Size], batch: list[int]) -> int:
    return sum(sizes[i].tokens for i in batch)


def filled(sizes: list[Size], batch: list[int]) -> int:
    return sum(sizes[i].rows for i in batch) * max(sizes[i].longest for i in batch)


WAYS: list[tuple[Callable[[list[Size], int], list[list[int]]], Any]] = [
    (evenly, summed),
    (padded, filled),
    (lambda sizes, budget: padded(sizes, budget, by_length=False), filled),
]


@pytest.mark.parametrize(("form", "cost"), WAYS, ids=["shared", "padded", "padded as drawn"])
@settings(deadline=None, max_examples=50)
@given(sizes=SIZES, budget=st.integers(1, 600))
def test_every_example_is_in_one_batch_and_none_is_above_the_budget_but_what_is_so_alone(
    form: Any, cost: Any, sizes: list[Size], budget: int
) -> None:
    batches = form(sizes, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or cost(sizes, batch) <= budget
    assert batches == form(sizes, budget)


@settings(deadline=None, max_examples=50)
@given(sizes=SIZES, budget=st.integers(1, 600))
def test_no_two_batches_of_shared_tokens_could_be_one_less(sizes: list[Size], budget: int) -> None:
    # Longest first into the emptiest: a batch more is taken only where one less went over, so
    # that the batches are more than half full on average.
    batches = [b for b in evenly(sizes, budget) if summed(sizes, b) <= budget]
    if len(batches) > 1:
        assert 2 * sum(summed(sizes, b) for b in batches) > (len(batches) - 1) * budget


def test_a_pair_is_its_prompt_and_both_answers_and_padded_it_is_two_rows_of_the_longer() -> None:
    import datasets

    assert size_of(5, [3, 2]) == Size(tokens=10, longest=8, rows=2)
    pair = {"prompt_ids": [[1] * 5], "chosen_ids": [[2] * 3], "rejected_ids": [[3] * 2]}
    rows = {
        "pair": (pair, Size(10, 8, 2)),
        "answer": ({"prompt_ids": [[1] * 5], "answer_ids": [[2] * 3]}, Size(8, 8, 1)),
        "text": ({"input_ids": [[1] * 7], "labels": [[1] * 7]}, Size(7, 7, 1)),
        "list": ({"prompt_ids": [[1] * 5], "answers_ids": [[[2], [3] * 4, [4]]]}, Size(11, 9, 3)),
    }
    for columns, size in rows.values():
        assert sizes_of(datasets.Dataset.from_dict(columns)) == [size]
    assert sizes_of(datasets.Dataset.from_dict({"prompt": ["paint"]})) == []


def test_batches_are_evenly_full_or_of_similar_lengths() -> None:
    sizes = [size_of(0, [n]) for n in (1, 9, 5, 2, 8, 5, 1, 9)]

    def lengths(batches: list[list[int]]) -> list[list[int]]:
        return [[sizes[i].tokens for i in batch] for batch in batches]

    # 40 tokens, the longest first into the emptier of two: 9 | 9, 8 | 5, 5, then 2, 1 | 1.
    assert lengths(evenly(sizes, 20)) == [[9, 8, 2, 1], [9, 5, 5, 1]]
    # 2·9 = 18, 2·8 = 16 and with a third 24, 4·5 = 20.
    assert lengths(padded(sizes, 20)) == [[9, 9], [8, 5], [5, 2, 1, 1]]
    # As drawn: 2·9 = 18, 3·5 = 15 and with the 8 32, 2·8 = 16 and with the 1 24, 2·9 = 18.
    assert lengths(padded(sizes, 20, by_length=False)) == [[1, 9], [5, 2], [8, 5], [1, 9]]


@pytest.fixture(scope="module")
def long_and_short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pairs and 4 held-out ones, of very different lengths."""
    chance = random.Random(4)

    def pairs(number: int) -> list[Pair]:
        found = []
        for n in range(number):
            words = " ".join(chance.choices(THINGS, k=chance.randint(1, 12)))
            chosen, rejected = (
                " ".join(chance.choices(COLOURS, k=chance.randint(1, 12))) for _ in range(2)
            )
            found.append((f"paint {THINGS[n]} {words}", f"red {chosen}", f"blue {rejected}"))
        return found

    folder = tmp_path_factory.mktemp("lengths")
    write_split(folder, "train", pairs(21))
    write_split(folder, "test", pairs(4))
    return folder


Update = tuple[list[tuple[int, Any]], float, dict[str, float], dict[str, Any]]
"""Its batches with their numbers of examples, loss, metrics, gradients."""


def first_update(config: TrainingConfig, dataset: Path, folder: Path) -> Update:
    import torch
    from transformers import set_seed

    method = method_of(config)
    learnt, _ = method.load(config, dataset, load_tokenizer(config.model, None))
    set_seed(0)
    trainer: Any = method.build(config, TrainingRuntime(), folder, learnt, None)
    set_seed(3)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # another model than its reference
            parameter.data += 0.02 * torch.randn_like(parameter)
    set_seed(5)
    update = iter(trainer.get_train_dataloader())
    samples, items = trainer.get_batch_samples(update, 1, trainer.args.device)
    (first,) = samples
    parts = first if isinstance(first, list) else [(config.batch_size, first)]
    trainer.current_gradient_accumulation_steps = 1
    loss = float(trainer.training_step(trainer.model, first, items))
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert all(len(values) == 1 for values in trainer._metrics["train"].values())
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return parts, loss, metrics, gradients


@pytest.mark.parametrize(
    ("forward", "method"),
    [
        ("shared", {"method": "dpo"}),
        ("padded", {"method": "reward"}),
        ("padded", {"method": "orpo"}),
        ("padded", {"method": "sft"}),
        *(
            pytest.param(forward, method, marks=pytest.mark.slow)
            for forward, method in (
                ("padded", {"method": "dpo"}),
                ("shared", {"method": "dpo", "labels": "soft", "margin": 0.5}),
                ("padded", {"method": "dpo", "labels": "soft", "balance": "prompts"}),
                ("shared", {"method": "reward"}),
            )
        ),
    ],
    ids=str,
)
def test_an_update_in_batches_of_tokens_is_the_mean_over_its_examples(
    forward: str,
    method: dict[str, Any],
    model: str,
    long_and_short: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if forward == "padded":
        monkeypatch.setattr(shared_prefix, "why_not", lambda _: "the test wants padding")
    settings = {**QUICK, "model": model, "probe": None, "max_length": 64, **method}

    def update(**batch: int) -> Update:
        config = TypeAdapter(Alignment).validate_python({**settings, **batch})
        return first_update(config, long_and_short, tmp_path / str(len(batch)))

    _, loss, metrics, gradients = update(batch_size=14)
    parts, found, told, slopes = update(batch_size=14, batch_tokens=150)
    numbers = [number for number, _ in parts]
    assert sum(numbers) == 14
    assert len(set(numbers)) > 1  # or a mean of means would do
    assert found == pytest.approx(loss, rel=1e-5)
    assert apart(slopes, gradients) < 1e-5
    # What is a mean over pairs is told as one; means over tokens are nearly so.
    assert told.keys() == metrics.keys()
    for name in ("rewards/accuracies", "rewards/margins", "logps/chosen", "nll_loss"):
        if name in metrics:
            assert told[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5)


def test_likes_are_weighted_by_numbers_too(
    model: str, long_and_short: Path, tmp_path: Path
) -> None:
    settings = {**QUICK, "model": model, "probe": None, "max_length": 64, "method": "kto"}
    settings |= {"batch_size": 14, "batch_tokens": 80}
    # With β → 0 every answer's loss is ½ of its weight, whatever its batch's z is.
    settings |= {"beta": 1e-9, "desirable_weight": 4.0, "undesirable_weight": 1.0}
    config = TypeAdapter(Alignment).validate_python(settings)
    parts, loss, _, _ = first_update(config, long_and_short, tmp_path)
    likes = [int(sum(batch["label"])) for _, batch in parts]
    assert len({number for number, _ in parts}) > 1
    assert len(set(likes)) > 1
    assert loss == pytest.approx((4 * sum(likes) + 14 - sum(likes)) / 14 / 2, rel=1e-6)


def test_a_budget_changes_the_batches_and_neither_steps_nor_rates_nor_what_is_learnt(
    model: str,
    long_and_short: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[int]] = []

    def spied(sizes: list[Size], budget: int) -> list[list[int]]:
        found = evenly(sizes, budget)
        assert budget == 120
        seen.append([summed(sizes, batch) for batch in found])
        return found

    monkeypatch.setattr(batches, "evenly", spied)
    settings: dict[str, Any] = {
        **QUICK,
        "model": model,
        "probe": None,
        "max_length": 64,
        "learning_rate": 1e-4,
        "max_steps": None,
        "epochs": 2.5,
        "warmup_share": 0.3,
        "batch_size": 8,
        "eval_steps": 4,
    }
    runs, weights, logs = [], [], []
    for name, batch in (("number", {}), ("tokens", {"batch_tokens": 120})):
        run = tmp_path / name
        runs.append(
            train(DPOConfig(**settings, **batch), long_and_short, run, EVERY, progress=silent)
        )
        weights.append(saved_weights(run, runs[-1]))
        logs.append([json.loads(line) for line in (run / "metrics.jsonl").open()])
    # 21 pairs in updates of 8 are 3 an epoch, the last of 5; ⌈2.5·3⌉ = 8.
    assert [run.steps for run in runs] == [8, 8]
    assert len(seen) >= 8  # one more may be prepared than is taken
    assert max(map(len, seen)) > 1
    assert all(tokens <= 120 for update in seen for tokens in update)
    every = sum(size.tokens for size in sizes_of(_rows(settings, long_and_short)))
    assert sum(sum(update) for update in seen[:3]) == sum(map(sum, seen[3:6])) == every
    assert apart(*weights) < 1e-6
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "learning_rate", "rewards/accuracies", "eval_loss"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def _rows(settings: Mapping[str, Any], dataset: Path) -> Any:
    config = DPOConfig(**settings)
    pairs, _ = dpo.load_data(config, dataset, load_tokenizer(config.model, None))
    assert pairs is not None
    return pairs.rows


def test_an_interrupted_run_in_batches_of_tokens_ends_as_an_uninterrupted_one(
    model: str, long_and_short: Path, tmp_path: Path
) -> None:
    config = DPOConfig(
        **{
            **QUICK,
            "model": model,
            "probe": None,
            "max_length": 64,
            "batch_size": 8,
            "batch_tokens": 120,
            "max_steps": 6,
            "lora": {"rank": 4, "dropout": 0.2},  # so that random state matters
        }
    )
    every = TrainingRuntime(log_steps=2, save_steps=2)

    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            raise Stop

    whole = train(config, long_and_short, tmp_path / "whole", every, progress=silent)
    with pytest.raises(Stop):
        train(config, long_and_short, tmp_path / "run", every, progress=stop)
    result = train(config, long_and_short, tmp_path / "run", every, progress=silent)
    assert_same_run(tmp_path / "run", tmp_path / "whole", result, whole)


def test_people_are_told_what_an_update_is_in_tokens_and_what_does_not_fit(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A prompt is <bos> <user> paint, a thing, <end>, a newline and <assistant>: 7 tokens. Answers
    # have an end too: 7 + 3 + 4 = 14 tokens a pair, and the long one 7 + 21 + 4 = 32.
    pairs = [(f"paint {thing}", "red red", "blue red blue") for thing in THINGS[:15]]
    pairs.append(("paint thing15", " ".join(["red"] * 20), "blue red blue"))
    write_split(tmp_path, "train", pairs)
    settings = {**QUICK, "model": model, "probe": None, "max_steps": 1, "batch_size": 8}
    for name, batch in (("number", {}), ("tokens", {"batch_tokens": 30})):
        train(DPOConfig(**settings, **batch), tmp_path, tmp_path / name)
    told = capsys.readouterr().err.splitlines()
    lines = [line for line in told if line.startswith(("tokens:", "warning: 1 of"))]
    # (15·14 + 32)/16·8 = 121.
    assert lines == [
        "tokens: about 121 an update",
        "tokens: about 121 an update, in batches of at most 30",
        "warning: 1 of 16 examples have more than batch_tokens; each is a batch of its own",
    ]
    assert batches.told(DPOConfig(**settings), None) == []  # PPO samples its answers


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"accumulation": 4, "batch_size": 2}, "leave accumulation out and say batch_size: 8"),
        ({"method": "sft", "packing": True}, "packed rows are all of max_length tokens"),
        ({"loss": "aot"}, "aot compares the pairs of a batch"),
        ({"method": "pretraining"}, "batch_tokens"),
        ({"method": "ppo"}, "batch_tokens"),
    ],
)
def test_what_has_no_batches_of_tokens_says_so(given: dict[str, Any], reason: str) -> None:
    values = {"model": "m", "method": "dpo", "batch_tokens": 100, "probe": None, **given}
    with pytest.raises(ValidationError, match=reason):
        TypeAdapter(Alignment).validate_python(values)


def test_held_out_data_and_references_stay_within_the_budget() -> None:
    config = DPOConfig(model="m", batch_size=64, batch_tokens=8192, max_length=512)
    assert config.eval_batch_size == 8  # 8·2·512 = 8192
    assert config.model_copy(update={"batch_tokens": None}).eval_batch_size == 64
