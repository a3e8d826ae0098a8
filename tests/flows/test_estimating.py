from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flows.estimating import (
    GPUS,
    Estimate,
    device_named,
    estimate,
    estimate_document,
    estimate_tables,
)
from flows.recipe import load_recipe
from flows.workload import Work, examples_of, training_flops, workload
from generation.candidates import ImportedCandidates
from preferences.errors import InputError
from training.dpo import DPOConfig
from training.memory import Examples
from training.ranked import RankedDPOConfig
from training.sft import SFTConfig

MINIATURE = Path("recipes/miniature/recipe.yaml")


@pytest.fixture(scope="module")
def stages() -> dict[str, Work]:
    return {work.name: work for work in workload(load_recipe(MINIATURE))}


def test_every_prompt_is_answered_as_often_as_the_recipe_says(stages: dict[str, Work]) -> None:
    work = stages["candidates: policy"]
    assert work.calls == 160 * 6
    assert work.written == 160 * 6 * 64


def test_an_adaptive_judge_is_asked_twice_for_each_answer(stages: dict[str, Work]) -> None:
    assert stages["judgments: judge"].calls == 160 * 6 * 2


def test_a_training_step_reads_both_answers_of_every_pair(stages: dict[str, Work]) -> None:
    assert stages["alignment: dpo"].calls == 60 * 16 * 2


def test_a_pair_of_answers_reads_its_prompt_once(stages: dict[str, Work]) -> None:
    lines = Path("recipes/miniature/prompts.jsonl").read_text().splitlines()[:160]
    asked = sum(len(json.loads(line)["prompt"]) for line in lines) / 4 / len(lines)
    # A character is a quarter of a token; both answers are taken to have all 64 they may.
    assert stages["alignment: dpo"].read == pytest.approx(60 * 16 * (asked + 2 * 64))


def test_answers_are_as_long_as_they_are_sampled_and_unknown_where_imported() -> None:
    recipe = load_recipe(MINIATURE)
    # Six are sampled of at most 64 tokens; a template ends a turn with up to four more.
    assert examples_of(recipe, recipe.trainings["alignment"]) == Examples(2, 68)
    assert examples_of(recipe, RankedDPOConfig(model="m")) == Examples(6, 68)
    imported = ImportedCandidates(kind="import", name="more", source="x.jsonl")
    mixed = recipe.model_copy(update={"candidates": (*recipe.candidates, imported)})
    assert examples_of(mixed, DPOConfig(model="m")) == Examples(2)


def test_probes_are_sampled_before_the_first_step_too(stages: dict[str, Work]) -> None:
    assert stages["alignment: probes"].calls == (60 // 20 + 1) * 24


def test_both_models_answer_and_the_judge_reads_both_orders(stages: dict[str, Work]) -> None:
    held_out = len(Path("recipes/miniature/test_prompts.jsonl").read_text().splitlines())
    assert stages["evaluation: answers"].calls == 2 * held_out * 2
    assert stages["evaluation: judge"].calls == held_out * 2 * 2


@pytest.mark.parametrize(
    ("config", "each"),
    [
        (SFTConfig(model="m", weights="full", gradient_checkpointing=False), 6),
        (SFTConfig(model="m", weights="full"), 8),
        (SFTConfig(model="m", gradient_checkpointing=False), 4),
        (SFTConfig(model="m"), 6),
        (DPOConfig(model="m"), 8),
    ],
)
def test_a_token_costs_so_many_operations_a_parameter(config: Any, each: int) -> None:
    assert training_flops(config, 1000, 10) == each * 1000 * 10


def test_an_endpoint_costs_what_its_prices_say(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "x" * 400}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
name: priced
prompts: {source: prompts.jsonl}
candidates:
  - {kind: sample, name: one, engine: openai, model: m, samples: 10, sampling: {max_tokens: 500}}
judges:
  - {kind: prior, name: order, order: [one, two]}
runtime:
  engines: {one: {price_per_million: [1.0, 4.0]}}
"""
    )
    found = estimate(recipe, {})
    # 400 characters are 100 tokens: 10 · (100 · 1 + 500 · 4) / 10⁶.
    assert found.stages[0].price == pytest.approx(0.021)
    assert found.cost == pytest.approx(0.021)
    assert found.memory is None


def test_hours_of_the_device_cost_their_price() -> None:
    work = Work("alignment: dpo", 1, 1.0, 0.0, 1.0, 989e12 * 7200)
    found = Estimate("r", "H100", (work,), (7200.0,), 3.5, None, None, None, (), None)
    assert found.total_seconds == 7200
    assert found.cost == pytest.approx(7.0)


def test_a_price_that_is_not_known_makes_no_cost() -> None:
    work = Work("candidates: a", 1, 1.0, 1.0, 0.0, 0.0, is_here=False)
    assert Estimate("r", None, (work,), (None,), 3.5, None, None, None, (), None).cost is None


def test_a_size_of_memory_has_no_speed() -> None:
    assert device_named("24GB").memory == 24e9
    assert device_named("24GB").peak is None
    assert device_named("h100") == GPUS["H100"]
    assert math.isfinite(device_named("cpu").peak or math.nan)


def test_a_gpu_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, match=r"gpu B999: not known; name H100, .* 24GB"):
        device_named("B999")


@pytest.mark.slow
def test_a_recipe_is_told_what_fits_and_what_to_change() -> None:
    found = json.loads(json.dumps(estimate_document(MINIATURE, {}, "2GB", 1.0)))
    assert found["model"]["total"] == 1_000_320
    assert not found["fits"][0]["fits"]
    assert found["cure"].startswith("say ")
    assert found["total_seconds"] is None


@pytest.mark.slow
def test_an_estimate_is_shown_as_tables() -> None:
    titles = [str(getattr(table, "title", "")) for table in estimate_tables(MINIATURE, {})]
    assert titles[0].startswith("miniature")
    assert titles[1] == "Memory to train llama of 1,000,320 parameters"
