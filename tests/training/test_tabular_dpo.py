"""DPO ends where theory says, through the real data, collator, loss and trainer.

With labels by Bradley and Terry's model the optimum of the loss is π* ∝ π_ref·exp(r/β) (Rafailov
et al. 2023, section 4). A trainer that is subtly wrong ends somewhere else, and its loss falls all
the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.training.conftest import saved_weights, silent
from tests.training.tabular import (
    kl,
    log_probs,
    optimum,
    random_table,
    read_table,
    some_pairs,
    write_pairs,
    write_table,
)
from training.dpo import DPOConfig
from training.loop import train
from training.reference import CachedReference
from training.run import TrainingRuntime

BETA = 0.3
REFERENCE = random_table(0)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_table(tmp_path_factory.mktemp("table"), REFERENCE)


@pytest.fixture(scope="module")
def exact_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "d", some_pairs(2))


def distance(table: str, dataset: Path, run: Path, **changes: Any) -> float:
    """KL(π‖π*) in nats after training."""
    config = DPOConfig(
        **{
            "model": table,
            "weights": "full",
            "dtype": "float32",
            "beta": BETA,
            "labels": "soft",
            "learning_rate": 1.0,
            "schedule": "cosine",
            "warmup_share": 0.1,
            "batch_size": 170,
            "max_steps": 300,
            "max_length": 32,
            "gradient_checkpointing": False,
            "probe": None,
            **changes,
        }
    )
    result = train(config, dataset, run, TrainingRuntime(), progress=silent)
    learnt = log_probs(read_table(saved_weights(run, result)["lm_head.weight"]))
    return kl(learnt, optimum(log_probs(REFERENCE), BETA))


def test_the_optimum_is_reached(table: str, exact_labels: Path, tmp_path: Path) -> None:
    assert distance(table, exact_labels, tmp_path / "run") < 1e-8


def no_reference(patch: pytest.MonkeyPatch) -> None:
    def zeros(self: Any, dataset: Any, *_: Any) -> Any:
        for column in ("ref_chosen_logps", "ref_rejected_logps"):
            dataset = dataset.add_column(column, [0.0] * len(dataset))
        return dataset

    patch.setattr(CachedReference, "_precompute_ref_logps", zeros)


def masked(place: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The first or the last token of every answer counts for nothing."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = DataCollatorForPreference.torch_call

        def collate(self: Any, examples: list[Any]) -> Any:
            batch = real(self, examples)
            mask = batch["completion_mask"]
            order = mask.cumsum(dim=1)
            at = 1 if place == "first" else order[:, -1:]
            batch["completion_mask"] = mask * (order != at)
            return batch

        patch.setattr(DataCollatorForPreference, "torch_call", collate)

    return plant


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        (no_reference, {}),
        (masked("first"), {}),
        (masked("last"), {}),
        (None, {"beta": 2 * BETA}),
        (None, {"loss": "sigmoid_norm"}),
        (None, {"labels": "hard", "max_steps": 30}),  # certain labels have no optimum at all
    ],
    ids=["no reference", "first token", "end token", "beta twice", "length-averaged", "hard"],
)
def test_a_planted_fault_ends_far_from_it(
    fault: Callable[[pytest.MonkeyPatch], None] | None,
    changes: dict[str, Any],
    table: str,
    exact_labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault is not None:
        fault(monkeypatch)
    # Half of the steps bring the right one to 4e-6 already.
    changes = {"max_steps": 150, **changes}
    assert distance(table, exact_labels, tmp_path / "run", **changes) > 0.01
