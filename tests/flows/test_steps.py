"""Chains of training: what starts from what, what is shared, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.estimating import estimate
from flows.plan import Plan, make_plan
from flows.recipe import load_recipe, recipe_text
from flows.workload import workload
from preferences.errors import InputError
from tests.flows.test_recipe import MINIATURE, recipe

POLICY = str(MINIATURE / "policy")
BLIND = {"probe": None, "max_steps": 4, "batch_size": 2}
SFT = {"method": "sft", "model": POLICY, **BLIND}
DPO = {"method": "dpo", "model": "start", **BLIND}
JUDGE = {"method": "reward", "model": "start", **BLIND}
PPO = {"method": "ppo", "model": "start", "reward_model": "judge", "rollouts": 2, **BLIND}
TEXTS = {"method": "pretraining", "model": POLICY, "replay": 0, "max_steps": 4, "batch_size": 2}


def planned(folder: Path, **changes: Any) -> Plan:
    return make_plan(load_recipe(recipe(folder, **changes)))


def test_a_plan_names_every_step_before_the_alignment(tmp_path: Path) -> None:
    plan = planned(tmp_path, steps={"start": SFT, "judge": JUDGE}, alignment=PPO)
    names = [name for name, _ in plan.artifacts]
    assert names[-4:] == ["dataset", "steps: start", "steps: judge", "alignment"]
    assert len({artifact for _, artifact in plan.artifacts}) == len(names)


def test_an_edited_alignment_leaves_the_step_it_starts_from(tmp_path: Path) -> None:
    before = planned(tmp_path, steps={"start": SFT}, alignment=DPO)
    after = planned(tmp_path, steps={"start": SFT}, alignment={**DPO, "beta": 0.3})
    assert before.steps == after.steps
    assert before.alignment != after.alignment


def test_an_edited_step_makes_all_that_starts_from_it_anew(tmp_path: Path) -> None:
    steps = {"start": SFT, "judge": JUDGE}
    before = planned(tmp_path, steps=steps, alignment=PPO)
    edited = {"start": SFT, "judge": {**JUDGE, "centring": 0.1}}
    after = planned(tmp_path, steps=edited, alignment=PPO)
    assert before.steps[0] == after.steps[0]
    assert before.steps[1] != after.steps[1]
    assert before.alignment != after.alignment
    again = planned(tmp_path, steps={**steps, "start": {**SFT, "seed": 1}}, alignment=PPO)
    assert not {*before.steps, before.alignment} & {*again.steps, again.alignment}


def test_a_step_is_what_it_does_and_not_what_it_is_called(tmp_path: Path) -> None:
    alone = planned(tmp_path, alignment=SFT)
    step = planned(tmp_path, steps={"first": SFT}, alignment={**DPO, "model": "first"})
    other = planned(tmp_path, steps={"start": SFT}, alignment=DPO)
    assert step.steps == other.steps == (alone.alignment,)
    assert step.alignment == other.alignment


def test_what_training_does_not_look_at_trains_nothing_anew(tmp_path: Path) -> None:
    check = {"reward": f"{MINIATURE / 'world.py'}:reward"}
    well_formed = {"well_formed": f"{MINIATURE / 'world.py'}:well_formed"}
    watched = {**DPO, "model": POLICY, "probe": {"every": 2}}
    judges = [{"kind": "verifier", "name": "v", "check": "regex", "pattern": "a"}]

    def plan(alignment: dict[str, Any], checks: dict[str, str]) -> Plan:
        evaluation = {"checks": checks}
        return planned(tmp_path, judges=judges, alignment=alignment, evaluation=evaluation)

    blind = {**watched, "probe": None}
    assert plan(watched, {}).alignment == plan(watched, check).alignment
    assert plan(watched, {}).alignment != plan(watched, well_formed).alignment
    assert plan(blind, {}).alignment == plan(blind, well_formed).alignment


def test_the_texts_of_a_pretraining_count_by_what_they_say(tmp_path: Path) -> None:
    def plan(name: str, text: str, **changes: Any) -> Plan:
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
        steps = {"field": {**TEXTS, "texts": {"new": [name], **changes}}}
        return planned(tmp_path, steps=steps, alignment={**SFT, "model": "field"})

    first = plan("a.jsonl", "Wipe the chair.")
    assert plan("b.jsonl", "Wipe the chair.").steps == first.steps
    assert plan("a.jsonl", "Wipe the lamp.").steps != first.steps
    assert plan("a.jsonl", "Wipe the chair.", held_out=0.5).steps != first.steps
    # Other answers make another dataset, of which a pre-training sees nothing.
    values = [{"kind": "prior", "name": "order", "order": ["weak", "strong"]}]
    steps = {"field": {**TEXTS, "texts": {"new": ["b.jsonl"]}}}
    other = planned(tmp_path, judges=values, steps=steps, alignment={**SFT, "model": "field"})
    assert other.dataset != first.dataset
    assert other.steps == first.steps
    assert other.alignment != first.alignment


@pytest.mark.parametrize(
    ("steps", "alignment", "message"),
    [
        ({"start": SFT}, None, "steps: need `alignment`"),
        ({"alignment": SFT}, {**DPO, "model": "alignment"}, "steps.alignment: that is the last"),
        ({"start": SFT}, {**DPO, "model": "strat"}, "steps.start: nothing starts from it"),
        ({"start": DPO}, DPO, r"steps.start.model: 'start' is no step before it"),
        (
            {"one": {**SFT, "model": "two"}, "two": SFT},
            {**DPO, "model": "one"},
            r"steps.one.model: 'two' is no step before it; steps are trained in the order",
        ),
        (
            {"start": {**SFT, "weights": "prompt_tuning"}},
            DPO,
            "the step 'start' trains weights: prompt_tuning, which cannot be merged",
        ),
        (
            {"judge": {**JUDGE, "model": POLICY}},
            {**DPO, "model": "judge"},
            "alignment.model: the step 'judge' trains a reward model",
        ),
        (
            {"start": SFT},
            {**DPO, "revision": "v2"},
            "alignment.revision: the step 'start' has none",
        ),
        (
            {"start": SFT, "judge": {**JUDGE, "model": POLICY}},
            PPO,
            r"alignment.reward_model: the step 'judge' is trained on policy and this on start",
        ),
        (
            {"start": SFT, "judge": {**SFT, "model": "start"}},
            PPO,
            "alignment.reward_model: the step 'judge' has method sft; name one with method: reward",
        ),
        (
            {"start": SFT, "judge": {**JUDGE, "weights": "full"}},
            PPO,
            "alignment.reward_model: the step 'judge' trains full weights",
        ),
        ({"field": TEXTS}, {**SFT, "model": "field"}, "steps.field.texts: missing"),
        (
            {"field": {**TEXTS, "replay": 0.1, "texts": {"new": ["a.jsonl"]}}},
            {**SFT, "model": "field"},
            "steps.field: replay: 0.1 of what is trained on are old texts and there are none",
        ),
        ({"start": {**SFT, "bta": 1}}, DPO, "steps.start.bta: unknown key"),
        ({"dpo": {**DPO, "model": POLICY, "bta": 1}}, DPO, "dpo.bta: unknown key; .*'beta'"),
        ({"start": {"method": "sfft"}}, DPO, "steps.start.method: no 'sfft'; did you mean 'sft'?"),
        ({"start": {"method": "sft"}}, DPO, "steps.start.model: missing"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_with_the_cure(
    steps: dict[str, Any], alignment: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as told:
        load_recipe(recipe(tmp_path, steps=steps, alignment=alignment))
    assert "\n" not in str(told.value)


def test_a_name_that_is_a_folder_too_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps={"start": SFT}, alignment=DPO)
    assert load_recipe(path).alignment is not None
    (tmp_path / "start").mkdir()
    with pytest.raises(InputError, match=r"steps\.start: there is a file or folder of this name"):
        load_recipe(path)


def test_a_dataset_is_built_without_looking_at_the_steps(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps={"start": {**SFT, "model": "${base}"}}, alignment=DPO)
    assert load_recipe(path, dataset_only=True).steps == {}


def test_a_recipe_means_the_same_when_it_is_written_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Wipe."}\n')
    steps = {"field": {**TEXTS, "texts": {"new": ["a.jsonl"]}}, "start": {**SFT, "model": "field"}}
    loaded = load_recipe(recipe(tmp_path, steps=steps, alignment=DPO))
    elsewhere = tmp_path / "elsewhere" / "recipe.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(recipe_text(loaded, str(tmp_path / "store")))
    again = load_recipe(elsewhere)
    assert again.runtime.store == str(tmp_path / "store")
    assert make_plan(again).artifacts == make_plan(loaded).artifacts


def test_every_training_of_a_chain_is_estimated(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps={"start": SFT, "judge": JUDGE}, alignment=PPO)
    names = {work.name: work for work in workload(load_recipe(path))}
    # A step of four has two answers for SFT, and two pairs for a reward model.
    assert names["steps: start: sft"].calls == 4 * 2
    assert names["steps: judge: reward"].calls == 4 * 2 * 2
    assert names["alignment: rollouts"].calls == 4 * 2


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "largest"), [(16, "start"), (1, "alignment")])
def test_memory_is_told_of_the_training_that_needs_the_most(
    batch: int, largest: str, tmp_path: Path
) -> None:
    steps = {"start": {**SFT, "batch_size": batch}}
    found = estimate(recipe(tmp_path, steps=steps, alignment={**DPO, "batch_size": 4}), {})
    assert found.training == largest


def test_a_pretraining_reads_as_many_tokens_as_its_texts_have(tmp_path: Path) -> None:
    # 20 texts of 400 characters are 2,000 tokens; with a fifth of old ones among them, 2,500; in
    # blocks of 100 and updates of 5 blocks, 5 steps.
    rows = [json.dumps({"text": "abcd" * 100}) + "\n"] * 20
    (tmp_path / "a.jsonl").write_text("".join(rows))
    texts = {"new": ["a.jsonl"], "old": ["a.jsonl"]}
    step = {"method": "pretraining", "model": POLICY, "texts": texts, "replay": 0.2}
    step |= {"max_length": 100, "batch_size": 5}
    path = recipe(tmp_path, steps={"field": step}, alignment={**SFT, "model": "field"})
    (work,) = [w for w in workload(load_recipe(path)) if w.name == "steps: field: pretraining"]
    assert (work.calls, work.read) == (25, 2500)
