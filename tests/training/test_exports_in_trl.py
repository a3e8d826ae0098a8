"""What `pairwright export` writes goes into TRL's own trainers as it is."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from preferences.card import dataset_card, dataset_facts
from preferences.export import export
from preferences.records import Message, Triplet, to_table
from tests.training.conftest import THINGS, answer

COMMON: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_length": 48,
}


def triplet(number: int) -> Triplet:
    """The chosen answer is `red red`, the rejected one other colours."""
    thing = THINGS[number % len(THINGS)]
    return Triplet(
        preference_id=f"c{number}>r{number}",
        prompt_id=f"p{number}",
        prompt=(Message("user", f"paint {thing}"),),
        chosen=(Message("assistant", "red red"),),
        rejected=(Message("assistant", answer(random.Random(number))),),
        chosen_id=f"c{number}",
        rejected_id=f"r{number}",
        chosen_model="m",
        rejected_model="n",
        probability=0.75,
        margin=1.5,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset of twelve and four pairs, as the store holds one."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "data").mkdir()
    rows = {"train": range(12), "test": range(12, 16)}
    tables = {split: to_table(Triplet, map(triplet, numbers)) for split, numbers in rows.items()}
    for split, table in tables.items():
        pq.write_table(table, folder / "data" / f"{split}-000-of-001.parquet")
    sides = {split: dataset_facts([table]) for split, table in tables.items()}
    (folder / "README.md").write_text(dataset_card("pairs", "", None, sides, [], "name: pairs"))
    return folder


def exported(dataset: Path, folder: Path, form: str) -> Any:
    """The dataset in one form, as the `datasets` library loads it from the exported folder."""
    import datasets

    export(dataset, folder / form, form, "pairs")
    return datasets.load_dataset(str(folder / form), cache_dir=str(folder / "cache"))


def first_log(trainer: Any) -> Mapping[str, float]:
    """Train one step; what the trainer logged of it, all finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert trainer.state.global_step == 1
    assert math.isfinite(log["loss"])
    assert math.isfinite(log["grad_norm"])
    assert log["grad_norm"] > 0
    return log


def policy(model: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model)
    return {"model": loaded, "processing_class": AutoTokenizer.from_pretrained(model)}


@pytest.mark.parametrize("form", ["conversational", "plain"])
def test_dpo_takes_a_step_on_it(dataset: Path, model: str, tmp_path: Path, form: str) -> None:
    from trl import DPOConfig, DPOTrainer

    data = exported(dataset, tmp_path, form)
    trainer = DPOTrainer(
        args=DPOConfig(output_dir=str(tmp_path / "run"), **COMMON),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        **policy(model),
    )
    # Before the first update the policy is the reference: the loss is log 2.
    assert first_log(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("form", ["conversational", "plain"])
def test_a_reward_model_takes_a_step_on_it(
    dataset: Path, model: str, tmp_path: Path, form: str
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    data = exported(dataset, tmp_path, form)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    trainer = RewardTrainer(
        model=scorer,
        args=RewardConfig(output_dir=str(tmp_path / "run"), **COMMON),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    log = first_log(trainer)
    assert 0 <= log["accuracy"] <= 1
    # TRL asks for a lead of the column `margin`: an untrained head scores both answers nearly
    # alike, and the loss is not log 2 = 0.69 but log(1 + e^1.5) = 1.70.
    assert log["loss"] == pytest.approx(math.log(1 + math.exp(1.5)), abs=0.3)


@pytest.mark.parametrize("form", ["conversational", "plain"])
def test_orpo_takes_a_step_on_it(dataset: Path, model: str, tmp_path: Path, form: str) -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    data = exported(dataset, tmp_path, form)
    trainer = orpo.ORPOTrainer(
        args=orpo.ORPOConfig(output_dir=str(tmp_path / "run"), **COMMON),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        **policy(model),
    )
    log = first_log(trainer)
    assert log["nll_loss"] > 0
    assert 0 <= log["rewards/accuracies"] <= 1


def test_kto_takes_a_step_on_it(dataset: Path, model: str, tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    data = exported(dataset, tmp_path, "kto")
    # Each of the 12 pairs is two answers, one preferred and one not.
    assert sum(data["train"]["label"]) == 12
    assert len(data["train"]) == 24
    trainer = KTOTrainer(
        args=KTOConfig(output_dir=str(tmp_path / "run"), **COMMON),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        **policy(model),
    )
    first_log(trainer)
