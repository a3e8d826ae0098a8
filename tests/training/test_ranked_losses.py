"""The losses and the metrics of ranked lists against formulas written here anew, in float64.

The policy is a table of logits (`tests.training.tabular`), so its log-probabilities are computed
apart from the trainer too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.training.conftest import QUICK
from tests.training.ranked import pair_rows, write_rows
from tests.training.tabular import Table, log_probs, random_table, read_table, write_table
from tests.training.test_dpo_losses import exact_lm_head
from training.models import load_tokenizer
from training.ranked import RankedDPOConfig, build_trainer, load_data
from training.run import TrainingRuntime

Array = NDArray[np.float64]

ANSWERS = (
    ["red", "blue green", "white white red", "green"],
    ["blue", "red white", "white"],
    ["green blue", "blue blue blue"],
)
"""Of three prompts, from the best to the worst."""
BETA = 0.3


def pairs_of(answers: list[str]) -> list[tuple[int, int]]:
    """The first list's middle two are a tie."""
    every = itertools.combinations(range(len(answers)), 2)
    return [pair for pair in every if len(answers) < 4 or pair != (1, 2)]


def probability(better: int, worse: int) -> float:
    return 0.55 + 0.1 * (worse - better)


def margin(better: int, worse: int) -> float:
    return 0.7 * (worse - better)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log-probabilities, and what the collator makes of numbers, in float64."""
    monkeypatch.setattr("trl.trainer.dpo_trainer.add_fused_lm_head", exact_lm_head)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


Formula = Callable[[Array, Array, list[tuple[int, int]]], float]
"""Of one list: gains, tokens, pairs."""


def mean_of_pairs(loss: Callable[[float, float, float], float], by_token: bool = False) -> Formula:
    """Of a loss of Δ, probability and margin; each answer's own Δ in tokens if so told."""

    def formula(gains: Array, lengths: Array, pairs: list[tuple[int, int]]) -> float:
        worth = gains / lengths if by_token else gains
        losses = [loss(worth[b] - worth[w], probability(b, w), margin(b, w)) for b, w in pairs]
        return sum(losses) / len(losses)

    return formula


def log_sigmoid(x: float) -> float:
    return float(-np.logaddexp(0, -x))


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def plackett_luce(gains: Array, lengths: Array, pairs: list[tuple[int, int]]) -> float:
    """Rafailov et al. 2023, equation 20, added up over the orders that agree with the pairs."""
    total = 0.0
    for order in itertools.permutations(range(len(gains))):
        if all(order.index(b) < order.index(w) for b, w in pairs):
            scores = np.exp(BETA * gains[list(order)])
            total += float(np.prod([scores[k] / scores[k:].sum() for k in range(len(scores))]))
    return -float(np.log(total))


def exo(d: float, p: float, m: float) -> float:
    q = sigmoid(BETA * d)
    return q * float(np.log(q / 0.9)) + (1 - q) * float(np.log((1 - q) / 0.1))


def discopop(d: float, p: float, m: float) -> float:
    mix = sigmoid(BETA * d / 0.05)
    return -(1 - mix) * log_sigmoid(BETA * d) + mix * float(np.exp(-BETA * d))


FORMULAS: dict[str, tuple[dict[str, Any], Formula]] = {
    "sigmoid": ({}, mean_of_pairs(lambda d, p, m: -log_sigmoid(BETA * d))),
    "soft with margin": (
        {"labels": "soft", "margin": 0.5},
        mean_of_pairs(
            lambda d, p, m: (
                -p * log_sigmoid(BETA * d - m / 2) - (1 - p) * log_sigmoid(m / 2 - BETA * d)
            )
        ),
    ),
    "a token": (
        {"loss": "sigmoid_norm"},
        mean_of_pairs(lambda d, p, m: -log_sigmoid(BETA * d), by_token=True),
    ),
    "hinge": ({"loss": "hinge"}, mean_of_pairs(lambda d, p, m: max(0.0, 1 - BETA * d))),
    "ipo": (
        {"loss": "ipo"},
        mean_of_pairs(lambda d, p, m: (d - 1 / (2 * BETA)) ** 2, by_token=True),
    ),
    "robust": (
        {"loss": "robust", "label_smoothing": 0.1},
        mean_of_pairs(
            lambda d, p, m: (-0.9 * log_sigmoid(BETA * d) + 0.1 * log_sigmoid(-BETA * d)) / 0.8
        ),
    ),
    "exo_pair": ({"loss": "exo_pair", "label_smoothing": 0.1}, mean_of_pairs(exo)),
    "discopop": ({"loss": "discopop"}, mean_of_pairs(discopop)),
    "plackett_luce": ({"loss": "plackett_luce"}, plackett_luce),
}


def table_dataset(folder: Path) -> Path:
    rows = [
        {**row, "probability": probability(*pair), "margin": margin(*pair)}
        for number, answers in enumerate(ANSWERS)
        for pair in pairs_of(answers)
        for row in pair_rows(f"paint thing{number}", [(answers[pair[0]], answers[pair[1]])])
    ]
    return write_rows(folder, "train", rows)


def expected_loss(formula: Formula, policy: Table, reference: Table) -> float:
    """The mean over the lists."""
    ours, theirs = log_probs(policy), log_probs(reference)
    losses = []
    for answers in ANSWERS:
        gains = np.array([ours[a] - theirs[a] for a in answers])
        lengths = np.array([len(a.split()) + 1.0 for a in answers])
        losses.append(formula(gains, lengths, pairs_of(answers)))
    assert np.std(losses) > 1e-3  # the lists do differ
    return sum(losses) / len(losses)


TABLES = (random_table(0).astype(np.float32).astype(np.float64), random_table(1))
"""The reference, as it is stored, and the policy."""


def table_trainer(changes: dict[str, Any], folder: Path) -> Any:
    """On the lists above, in float64; its policy is not its reference any more."""
    reference, policy = TABLES
    model = write_table(folder / "model", reference)
    settings = {**QUICK, "model": model, "weights": "full", "beta": BETA, "probe": None, **changes}
    dataset = table_dataset(folder / "data")
    config = RankedDPOConfig(**settings)
    lists, _ = load_data(config, dataset, load_tokenizer(model, None))
    assert lists is not None
    trainer = build_trainer(config, TrainingRuntime(), folder / "run", lists, None)
    trainer.model.double().eval()
    trainer.model.lm_head.weight.data = torch.tensor(policy.T)
    return trainer


SOME = ("soft with margin", "robust", "plackett_luce")


@pytest.mark.parametrize(
    "name",
    [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in FORMULAS],
)
def test_each_loss_of_a_list_is_its_formula_and_so_is_its_gradient(
    name: str, float64: None, tmp_path: Path
) -> None:
    changes, formula = FORMULAS[name]
    reference, policy = TABLES
    trainer = table_trainer(changes, tmp_path)
    ours = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    ours.backward()
    assert float(ours.detach()) == pytest.approx(
        expected_loss(formula, policy, reference), rel=1e-6
    )
    gradient = read_table(trainer.model.lm_head.weight.grad)
    numeric = np.zeros_like(policy)
    for at in np.argwhere(np.abs(gradient) > 0):
        moved = [policy.copy(), policy.copy()]
        for table, step in zip(moved, (1e-5, -1e-5), strict=True):
            table[tuple(at)] += step
        up, down = (expected_loss(formula, table, reference) for table in moved)
        numeric[tuple(at)] = (up - down) / 2e-5
    assert np.abs(numeric).max() > 1e-3
    assert np.abs(gradient - numeric).max() < 1e-6 * np.abs(numeric).max()


def test_metrics_are_of_ranks_and_lists(float64: None, tmp_path: Path) -> None:
    trainer = table_trainer({}, tmp_path)
    trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    found = {name: value for name, (value,) in trainer._metrics["eval"].items()}
    reference, policy = map(log_probs, TABLES)
    rewards = [[BETA * (policy[a] - reference[a]) for a in answers] for answers in ANSWERS]
    apart = [
        [each[b] - each[w] for b, w in pairs_of(answers)]
        for each, answers in zip(rewards, ANSWERS, strict=True)
    ]
    expected = {
        # 5, 3 and 1 pairs
        "rewards/accuracies": sum(sum(d > 0 for d in each) / len(each) for each in apart) / 3,
        "rewards/margins": sum(sum(each) / len(each) for each in apart) / 3,
        "rewards/rank_1": (rewards[0][0] + rewards[1][0] + rewards[2][0]) / 3,
        "rewards/rank_2": (rewards[0][1] + rewards[1][1] + rewards[2][1]) / 3,
        "rewards/rank_3": (rewards[0][2] + rewards[1][2]) / 2,
        "rewards/rank_4": rewards[0][3],
        "logps/chosen": sum(policy[answers[0]] for answers in ANSWERS) / 3,
        "logps/rejected": sum(policy[answers[-1]] for answers in ANSWERS) / 3,
        "entropy": 0.0,  # the exchanged head tells none
    }
    assert found == pytest.approx(expected, rel=1e-6)
