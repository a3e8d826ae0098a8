"""Training with shared prompts is TRL's training: losses, metrics and weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.architectures import apart
from tests.training.conftest import saved_weights, silent
from training import dpo, kto, shared_prefix
from training.adapters import LoraConfig
from training.dpo import DPOConfig
from training.kto import KTOConfig
from training.loop import train
from training.models import load_tokenizer
from training.run import TrainingRuntime

MakeConfig = Callable[..., DPOConfig]


@contextmanager
def trls_forward() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix, "why_not", lambda _: "the test compares with it")
        yield


def moved_away(trainer: Any) -> None:
    """Make the policy another model than its reference."""
    torch.manual_seed(3)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)


def loss_and_metrics(trainer: Any, rows: int = 6) -> tuple[float, dict[str, Any]]:
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(rows)])
    trainer.model.train()  # TRL keeps the metrics of training and of evaluation apart.
    with torch.autocast("cpu", torch.bfloat16, trainer.args.bf16):
        loss = float(trainer.compute_loss(trainer.model, batch).detach())
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics
    return loss, metrics


def both_ways(make: Callable[[Path], Any], folder: Path, digits: float = 1e-5) -> None:
    """The loss and all metrics are equal, whichever forward pass runs."""
    with trls_forward():
        theirs = make(folder / "trl")
        assert theirs.forward_pass.startswith("TRL's")
        moved_away(theirs)
        loss, metrics = loss_and_metrics(theirs)
    ours = make(folder / "ours")
    assert ours.forward_pass.startswith("shared")
    moved_away(ours)
    found, told = loss_and_metrics(ours)
    assert found == pytest.approx(loss, rel=digits, abs=digits)
    assert told.keys() == metrics.keys()
    assert told == pytest.approx(metrics, rel=digits, abs=digits)


def pair_trainer(config: DPOConfig, dataset: Path) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        pairs, _ = dpo.load_data(config, dataset, load_tokenizer(config.model, None))
        assert pairs is not None
        return dpo.build_trainer(config, TrainingRuntime(), folder, pairs, None)

    return make


OTHER_LOSSES = (
    "sigmoid_norm",
    "hinge",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
)
LOSSES: tuple[Any, ...] = (
    {},
    {"labels": "soft", "margin": 0.5},
    *(
        pytest.param(changes, marks=pytest.mark.slow)
        for changes in (
            *({"loss": name} for name in OTHER_LOSSES),
            {"loss": "ipo"},
            {"loss": "ipo", "labels": "soft"},
            {"loss": "robust", "label_smoothing": 0.1},
            {"loss": "exo_pair", "label_smoothing": 0.1},
            {"loss": "hinge", "balance": "prompts"},
        )
    ),
)


@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_every_loss_and_its_metrics_are_the_same(
    changes: dict[str, Any], make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    both_ways(pair_trainer(make_config(**changes), red_pairs), tmp_path)


@pytest.mark.parametrize(
    ("weights", "digits"),
    [
        ("full", 1e-5),
        ("qlora", 1e-5),
        *(
            pytest.param(weights, 1e-5, marks=pytest.mark.slow)
            for weights in ("dora", "qdora", "ia3", "bottleneck", "ln_tuning")
        ),
    ],
)
def test_whatever_trains_the_loss_is_the_same(
    weights: str, digits: float, make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    both_ways(pair_trainer(make_config(weights=weights), red_pairs), tmp_path, digits)


def test_in_bfloat16_the_loss_is_the_same_to_its_digits(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    # bfloat16 has three digits, and log-probabilities of answers are sums of about -10.
    both_ways(pair_trainer(make_config(dtype="bfloat16"), red_pairs), tmp_path, 3e-2)


def test_likes_and_dislikes_are_trained_the_same(
    model: str, make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    names = set(KTOConfig.model_fields) - {"method"}
    settings = {k: v for k, v in make_config(batch_size=6).model_dump().items() if k in names}
    config = KTOConfig(**settings)

    def make(folder: Path) -> Any:
        answers, _ = kto.load_data(config, red_pairs, load_tokenizer(model, None))
        assert answers is not None
        return kto.build_trainer(config, TrainingRuntime(), folder, answers, None)

    both_ways(make, tmp_path)


@pytest.mark.slow
def test_twenty_steps_end_with_the_same_weights_and_the_same_log(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    # Adam makes a whole step of a gradient that is all but zero, so steps are small ones.
    config = make_config(
        max_steps=20, eval_steps=20, gradient_checkpointing=True, probe=None, learning_rate=5e-5
    )
    runtime = TrainingRuntime(log_steps=1, save_steps=20)
    with trls_forward():
        result = train(config, red_pairs, tmp_path / "trl", runtime, progress=silent)
        theirs = saved_weights(tmp_path / "trl", result)
    ours = saved_weights(
        tmp_path / "ours", train(config, red_pairs, tmp_path / "ours", runtime, progress=silent)
    )
    assert apart(ours, theirs) < 1e-6
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("ours", "trl")
    ]
    assert len(logs[0]) == len(logs[1]) >= 20
    for mine, other in zip(*logs, strict=True):
        assert mine.keys() == other.keys()
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert max(line.get("rewards/margins", 0) for line in logs[0]) > 0.01  # it did train


def test_people_are_told_which_forward_pass_runs(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, dropout in enumerate((0.0, 0.1)):
        config = make_config(lora=LoraConfig(dropout=dropout), probe=None, max_steps=1)
        train(config, red_pairs, tmp_path / f"{number}")
    lines = [line for line in capsys.readouterr().err.splitlines() if "forward pass" in line]
    assert lines == [
        "forward pass: shared: each prompt once, no padding, answers' tokens scored",
        "forward pass: TRL's, with padding and repeated prompts: dropout draws anew for every row",
    ]
