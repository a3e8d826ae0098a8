"""What would stop a recipe later is found before it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.check import check_inputs
from flows.recipe import Recipe
from preferences.errors import InputError
from tests.generation.tiny_model import write_adapter, write_model


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def adapter(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), policy)


@pytest.mark.parametrize(
    ("engine", "changes", "trained", "message"),
    [
        ("vllm", {}, None, None),
        ("transformers", {"peft_type": "PREFIX_TUNING"}, None, None),
        ("vllm", {"peft_type": "PREFIX_TUNING"}, None, "this is prefix_tuning; say engine: trans"),
        ("vllm", {"peft_type": "IA3"}, None, "this is ia3; merge it and name that model"),
        ("vllm", {"use_dora": True}, None, "LoRA alone, and this is dora; merge it"),
        ("vllm", {}, "qlora", "qlora fits a base in 4 bits, .* merge it and name the merged"),
        ("transformers", {"peft_type": "BITFIT"}, None, "biases, .* merge it"),
    ],
)
def test_an_adapter_is_put_on_by_who_can_and_on_what_it_was_trained_on(
    engine: str,
    changes: dict[str, Any],
    trained: str | None,
    message: str | None,
    policy: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    if trained:
        told = json.dumps({"weights": trained, "dtype": "bfloat16"})
        (tmp_path / "adapter" / "trained.json").write_text(told)
    prompts = "".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(20))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    sampled = {"kind": "sample", "name": "policy", "engine": engine, "model": str(policy)}
    values = {
        "name": "adapted",
        "prompts": {"source": str(tmp_path / "prompts.jsonl")},
        "candidates": [{**sampled, "adapter": str(tmp_path / "adapter")}],
        "judges": [{"kind": "verifier", "name": "v", "check": "regex", "pattern": "a"}],
        "split": {"test": 0.5},
    }
    recipe = Recipe.model_validate(values)
    if message is None:
        check_inputs(recipe)
        return
    with pytest.raises(InputError, match=message):
        check_inputs(recipe)


@pytest.mark.parametrize(
    ("column", "rows", "message"),
    [
        ("text", [{"text": "Once."}, {"text": ""}], None),
        ("text", [{"body": "Once."}], r"new.jsonl:1: no column 'text'; .*body"),
        ("body", [{"body": "Once."}, {"body": None}], r"new.jsonl:2: column 'body' holds NoneType"),
        ("text", [{"text": " "}], r"field.texts.new: no text in .*new.jsonl; add some"),
        ("text", [], r"field.texts.new: no text in .*new.jsonl; add some"),
        ("text", None, r"new.jsonl: no such file; check the path"),
    ],
)
def test_the_texts_of_a_pretraining_are_read(
    column: str, rows: list[dict[str, Any]] | None, message: str | None, tmp_path: Path
) -> None:
    answers = [
        {"prompt": f"Say {n}.", "model": model, "response": f"{model} {n}"}
        for n in range(20)
        for model in ("one", "two")
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    if rows is not None:
        (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {"new": [str(tmp_path / "new.jsonl")], "column": column}
    field = {"method": "pretraining", "model": "m", "texts": texts, "replay": 0}
    recipe = Recipe.model_validate(
        {
            "name": "read",
            "candidates": [
                {"kind": "import", "name": "answers", "source": str(tmp_path / "answers.jsonl")}
            ],
            "judges": [{"kind": "prior", "name": "order", "order": ["one", "two"]}],
            "split": {"test": 0.5},
            "steps": {"field": field},
            "alignment": {"method": "dpo", "model": "field"},
        }
    )
    if message is None:
        check_inputs(recipe)
        return
    with pytest.raises(InputError, match=message):
        check_inputs(recipe)
