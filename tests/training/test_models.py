"""Models are loaded and saved as they are, and their cards say what they are."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from preferences.estimate import Estimate
from preferences.store import Manifest
from training import models
from training.model_card import model_card
from training.run import TrainingResult


def test_every_kind_says_what_becomes_of_base_and_reference() -> None:
    kinds = set(get_args(models.Weights))
    assert {w for w in kinds if models.is_quantised(w)} == {"qlora", "qdora"}
    assert {w for w in kinds if not models.has_adapter(w)} == {"full", "bitfit"}
    assert {w for w in kinds if models.saved_folder(w) == "model"} == {"full"}


def test_a_generation_config_is_saved_as_it_was_published(model: str, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    base = tmp_path / "base"
    shutil.copytree(model, base)
    # A temperature without sampling: many models have it, and transformers refuses to save it.
    published = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 3}
    (base / "generation_config.json").write_text(json.dumps(published))
    policy = models.load_model(str(base), None, "full", "float32")
    tokenizer = models.load_tokenizer(str(base), None)
    models.save_model(policy, tokenizer, "full", "float32", tmp_path / "model")
    saved = GenerationConfig.from_pretrained(tmp_path / "model").to_dict()
    assert {name: saved[name] for name in published} == published
    policy.save_pretrained(tmp_path / "checkpoint")  # as the trainer does it


def test_a_save_that_breaks_off_leaves_what_was_there(model: str, tmp_path: Path) -> None:
    policy = models.load_model(model, None, "full", "float32")
    tokenizer = models.load_tokenizer(model, None)
    folder = tmp_path / "model"
    models.save_model(policy, tokenizer, "full", "float32", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Full:
        def save_pretrained(self, _: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        models.save_model(policy, Full(), "full", "bfloat16", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


COUNTS = {"rows": 50, "kept": 48, "dropped": {"answer_too_long": 2}}


def result(**changes: Any) -> TrainingResult:
    values: dict[str, Any] = {
        "fingerprint": "f00d",
        "method": "dpo",
        "model": "acme/base-1b",
        "weights": "qlora",
        "saved": "adapter",
        "saved_step": 40,
        "steps": 48,
        "planned_steps": 60,
        "update": 8,
        "stopped_early": True,
        "reason": "Stopped after step 48 of 60, where 20% are malformed.",
        "best_step": 40,
        "probes": (),
        "train": {**COUNTS, "boundary_shifted": 0, "without_end": 0},
        "test": None,
        "trainable_parameters": 1234567,
        "metrics": {"loss": 0.41234567},
        "evaluation": {"eval_loss": 0.5},
    }
    fields = {field.name for field in dataclasses.fields(TrainingResult)}
    known = {name: value for name, value in values.items() if name in fields}
    return TypeAdapter(TrainingResult).validate_python({**known, **changes})


STAGES = [
    Manifest("prompts", "aa11", "prompts", 60, 3, ()),
    Manifest("dataset", "bb22", "pairs", 50, 0, ()),
]


def test_a_card_names_data_recipe_measures_lineage_and_terms() -> None:
    from huggingface_hub import ModelCard

    card = model_card(
        "polite",
        result(),
        STAGES,
        "name: polite\nnote: '```'\n",
        evaluation={"win rate against the reference": Estimate(0.61, 0.55, 0.67, 120)},
        license="apache-2.0",
        dataset="acme/polite-pairs",
        merged="bfloat16",
    )
    # As the Hub reads it.
    read = ModelCard(card)
    assert read.data.license == "apache-2.0"
    assert read.data.base_model == "acme/base-1b"
    assert read.data.to_dict()["base_model_relation"] == "finetune"
    assert read.data.datasets == ["acme/polite-pairs"]
    assert read.data.pipeline_tag == "text-generation"
    assert read.data.library_name == "transformers"
    assert "| weights | qlora, merged in bfloat16 |" in card
    assert "| trained parameters | 1,234,567 |" in card
    assert "| trained on | 48 rows, 2 more dropped |" in card
    assert "| saved | step 40 of 60 |" in card
    assert "Stopped after step 48 of 60" in card
    assert "| win rate against the reference | 0.610 | 0.550 to 0.670 | 120 |" in card
    assert "| loss | 0.4123 |" in card
    assert "| pairs | 50 | 0 | `dataset/bb22` |" in card
    assert "````yaml\nname: polite\nnote: '```'\n````" in card


def test_an_adapters_card_says_what_it_has_to_be_put_on() -> None:
    from huggingface_hub import ModelCard

    card = model_card("polite", result(), STAGES, "name: polite")
    read = ModelCard(card)
    assert read.data.to_dict()["base_model_relation"] == "adapter"
    assert read.data.library_name == "peft"
    assert "fits the base in 4 bits alone" in card
    assert "load_trained" in model_card("b", result(weights="bottleneck"), STAGES, "name: b")


def test_a_card_tells_nothing_of_the_machine_and_lets_nobody_write_its_front() -> None:
    from huggingface_hub import ModelCard

    card = model_card(
        "nice\n---\nlicense: mit",
        result(model="/home/ann/models/base", saved="model", weights="full"),
        [],
        "name: nice",
        license='mit"\nbase_model: evil/one',
    )
    assert "/home/ann" not in card
    assert "`base`" in card
    read = ModelCard(card)
    assert read.data.license == 'mit"\nbase_model: evil/one'
    assert read.data.base_model is None
    assert "# nice --- license: mit" in card
