"""Training on ranked lists: a packed row gives what separate rows give, and a run learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.architectures import ARCHITECTURES, a_model, apart, padded
from tests.training.conftest import (
    QUICK,
    assert_an_interruption_changes_nothing,
    saved_weights,
    silent,
)
from tests.training.ranked import pair_rows, ranked, red_lists, write_rows
from tests.training.test_processes import ALONE, Job, assert_nearly_equal, together
from tests.training.test_shared_training import both_ways, loss_and_metrics, moved_away
from training import dpo
from training.evaluation import implicit_reward_accuracy
from training.loop import train
from training.models import end_tokens, load_tokenizer
from training.ranked import RankedDPOConfig, build_trainer, load_data
from training.ranked_lists import load_lists
from training.ranked_trainer import Collator, RankedTrainer
from training.run import TrainingRuntime
from training.shared_prefix import share

MakeRanked = Callable[..., RankedDPOConfig]


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return red_lists(tmp_path_factory.mktemp("lists"))


@pytest.fixture
def make_ranked(model: str) -> MakeRanked:
    """A configuration for the tiny model; keyword arguments change fields."""
    settings: dict[str, Any] = {"model": model, **QUICK, "beta": 0.3, "probe": None}
    return lambda **changes: RankedDPOConfig(**{**settings, **changes})


def trainer_for(config: RankedDPOConfig, dataset: Path, folder: Path) -> Any:
    found, _ = load_data(config, dataset, load_tokenizer(config.model, None))
    assert found is not None
    return build_trainer(config, TrainingRuntime(), folder, found, None)


# A packed row against separate rows through TRL's forward pass


def some_lists() -> list[dict[str, Any]]:
    """Four answers, three of which the second begins the third, and two."""
    torch.manual_seed(1)
    p, q, *others = (torch.randint(3, 97, (n,)).tolist() for n in (9, 14, 8, 5, 7, 6, 4))
    x, y, z, u, v = others
    answers = [(p, [x, y, z, u]), (q, [x, y[:2], y]), ([5], [v, [*v[:2], *z]])]
    certain = {"better": [0], "worse": [1], "probability": [1.0], "margin": [0.0]}
    return [{"prompt_ids": prompt, "answers_ids": told, **certain} for prompt, told in answers]


def weighed(model: Any, batches: list[dict[str, Tensor]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probabilities of every row's scored tokens, and the gradients of a sum of them in which
    each counts differently."""
    model.zero_grad()
    draw = torch.Generator().manual_seed(2)
    scored = []
    for batch in batches:
        found = model(**batch, fused_lm_head=True, use_cache=False).log_probs
        there = batch["labels"][:, 1:] != -100
        scored += [row[kept] for row, kept in zip(found, there, strict=True) if kept.any()]
    weights = [torch.randn(row.shape, generator=draw) for row in scored]
    sum((row * each).sum() for row, each in zip(scored, weights, strict=True)).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [row.detach() for row in scored], gradients


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_one_packed_row_gives_what_separate_rows_give_and_their_gradients(config: str) -> None:
    model = a_model(config)
    told = some_lists()
    by_rank = [
        (each["prompt_ids"], each["answers_ids"][rank])
        for rank in range(4)
        for each in told
        if rank < len(each["answers_ids"])
    ]
    expected, gradients = weighed(model, [padded([row]) for row in by_rank])
    share(model, answers=4)
    batch = Collator(4, pad=0)(told)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    packed = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    found, ours = weighed(model, [{**packed, "labels": labels}])
    assert len(found) == len(expected) == 9
    for row, other in zip(found, expected, strict=True):
        assert (row - other).abs().max() < 1e-5
    assert apart(ours, gradients) < 1e-6


LOSSES: tuple[Any, ...] = (
    {"loss": "plackett_luce"},
    {"labels": "soft", "margin": 0.5},
    *(
        pytest.param(changes, marks=pytest.mark.slow)
        for changes in (
            *({"loss": name} for name in ("sigmoid_norm", "hinge", "ipo", "discopop")),
            {"loss": "robust", "label_smoothing": 0.1},
            {"loss": "exo_pair", "label_smoothing": 0.1},
            {"weights": "qlora"},
            {"loss": "plackett_luce", "weights": "full"},
        )
    ),
)


@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_every_loss_and_its_metrics_are_those_of_trls_forward_pass(
    changes: dict[str, Any], make_ranked: MakeRanked, lists: Path, tmp_path: Path
) -> None:
    def make(folder: Path) -> Any:
        trainer = trainer_for(make_ranked(**changes), lists, folder)
        trainer.model.train()
        return trainer

    both_ways(make, tmp_path)


def test_two_answers_ranked_by_plackett_and_luce_are_a_pair_of_dpo(
    make_ranked: MakeRanked, lists: Path, tmp_path: Path
) -> None:
    rows = [
        row
        for n in range(6)
        for row in pair_rows(f"paint thing{n}", ranked([f"red {n % 2 * 'red'}".strip(), "blue"]))
    ]
    dataset = write_rows(tmp_path / "pairs", "train", rows)
    config = make_ranked(loss="plackett_luce")
    tokenizer = load_tokenizer(config.model, None)
    ends = end_tokens(config.model, None, tokenizer)
    two = load_lists(dataset, "train", tokenizer, ends=ends, max_length=48)
    assert two is not None
    listwise = build_trainer(config, TrainingRuntime(), tmp_path / "lists", two, None)
    shared = set(dpo.DPOConfig.model_fields) & set(RankedDPOConfig.model_fields)
    given = {name: getattr(config, name) for name in shared - {"method", "loss"}}
    pairs, _ = dpo.load_data(dpo.DPOConfig(**given), dataset, tokenizer)
    assert pairs is not None
    pairwise = dpo.build_trainer(
        dpo.DPOConfig(**given), TrainingRuntime(), tmp_path / "dpo", pairs, None
    )
    found = []
    for trainer in (listwise, pairwise):
        trainer.model.train()
        moved_away(trainer)
        found.append(loss_and_metrics(trainer))
    (loss, metrics), (theirs, others) = found
    assert abs(theirs - np.log(2)) > 1e-3
    assert loss == pytest.approx(theirs, rel=1e-6)
    for name in ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert metrics[name] == pytest.approx(others[name], rel=1e-5)
    assert metrics["rewards/rank_2"] == pytest.approx(others["rewards/rejected"], rel=1e-5)


# Whole runs


def test_a_reference_that_is_kept_is_not_computed_again(
    make_ranked: MakeRanked, lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_ranked(weights="full")
    first = trainer_for(config, lists, tmp_path / "first")
    assert {len(row["ref_rejected_logps"]) for row in first.train_dataset} == {2, 3}

    def again(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(RankedTrainer, "compute_ref_log_probs", again)
    second = trainer_for(make_ranked(weights="full", beta=0.5), lists, tmp_path / "second")
    assert second.train_dataset["ref_chosen_logps"] == first.train_dataset["ref_chosen_logps"]
    monkeypatch.undo()
    batch = first.data_collator([first.train_dataset[n] for n in range(4)])
    best, others = first.compute_ref_log_probs(first.model, batch)
    assert torch.allclose(batch["ref_chosen_logps"], best, atol=1e-5)
    assert torch.allclose(batch["ref_rejected_logps"], others, atol=1e-5)


def test_lists_ranked_by_red_make_the_policy_rank_by_red(
    make_ranked: MakeRanked, lists: Path, tmp_path: Path
) -> None:
    config = make_ranked(weights="full", loss="plackett_luce", max_steps=24)
    result = train(config, lists, tmp_path, progress=silent)
    assert (result.train.kept, result.update) == (24, 4)
    told = result.evaluation
    assert told["eval_rewards/accuracies"] > 0.9
    rewards = [told[f"eval_rewards/rank_{n}"] for n in (1, 2, 3, 4)]
    assert rewards == sorted(rewards, reverse=True)
    assert implicit_reward_accuracy(config, tmp_path, lists).accuracy.mean > 0.9


@pytest.mark.slow
def test_batches_of_bounded_tokens_learn_the_same(
    make_ranked: MakeRanked, lists: Path, tmp_path: Path
) -> None:
    learnt = []
    for budget in (None, 50):  # one or two lists of about thirty tokens
        config = make_ranked(batch_tokens=budget, max_steps=6, learning_rate=5e-5)
        folder = tmp_path / str(budget)
        learnt.append(saved_weights(folder, train(config, lists, folder, progress=silent)))
    assert apart(*learnt) < 1e-5


@pytest.mark.parametrize(
    ("loss", "weights"),
    [("plackett_luce", "lora"), pytest.param("sigmoid", "full", marks=pytest.mark.slow)],
)
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    loss: str, weights: str, make_ranked: MakeRanked, lists: Path, tmp_path: Path
) -> None:
    config = make_ranked(loss=loss, weights=weights, batch_size=2, accumulation=2)
    assert_an_interruption_changes_nothing(config, lists, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_learn_what_one_learns(
    make_ranked: MakeRanked, lists: Path, tmp_path: Path
) -> None:
    config = make_ranked(loss="plackett_luce", weights="full", max_steps=8, learning_rate=2e-4)
    alone = train(config, lists, tmp_path / "alone", ALONE, progress=silent)
    (both,) = together(Job(config, lists, tmp_path / "both"))
    ours, theirs = (saved_weights(tmp_path / run, both) for run in ("both", "alone"))
    assert_nearly_equal(ours, theirs)
    assert both.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-6)
    assert both.evaluation == pytest.approx(alone.evaluation, rel=1e-4, abs=1e-6)
