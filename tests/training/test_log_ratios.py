"""How far a policy has gone: exact where every answer's probability is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from preferences.records import Message
from tests.training.tabular import ANSWERS, kl, log_probs, random_table, write_table
from training.evaluation import OwnAnswer, Policy, log_ratios

PROMPT = (Message("user", "paint thing0"),)


@pytest.fixture
def policies(tmp_path: Path) -> tuple[Policy, Policy]:
    ours, theirs = (
        Policy(write_table(tmp_path / name, random_table(seed)))
        for seed, name in enumerate(("ours", "theirs"))
    )
    return ours, theirs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mean_over_all_answers_is_the_kl(
    policies: tuple[Policy, Policy], temperature: float
) -> None:
    ours, theirs = (log_probs(random_table(seed) / temperature) for seed in range(2))
    answers = [OwnAnswer(PROMPT, answer, finished=True) for answer in ANSWERS]
    found = log_ratios(*policies, answers, "float32", temperature)
    expected = [ours[answer] - theirs[answer] for answer in ANSWERS]
    assert found == pytest.approx(expected, abs=1e-4)
    mean = math.fsum(
        math.exp(ours[a]) * r for a, r in zip(ANSWERS, found, strict=True) if r is not None
    )
    assert mean == pytest.approx(kl(ours, theirs), abs=1e-4)


def test_an_answer_that_was_cut_counts_up_to_the_cut(policies: tuple[Policy, Policy]) -> None:
    whole, cut = log_ratios(
        *policies, [OwnAnswer(PROMPT, "red blue", done) for done in (True, False)], "float32"
    )
    tables = [random_table(seed) for seed in range(2)]
    # The end token after "red blue", state 4·(4·0 + 1 + 0) + 1 + 1 = 6, is what the two differ by.
    ends = [table[6] - math.log(math.fsum(math.exp(x) for x in table[6])) for table in tables]
    end = log_probs(tables[0])["red blue"] - log_probs(tables[1])["red blue"]
    assert whole == pytest.approx(end, abs=1e-4)
    assert cut == pytest.approx(end - (ends[0][3] - ends[1][3]), abs=1e-4)


def test_an_adapter_counts_and_a_model_is_no_distance_from_itself(
    model: str, tmp_path: Path
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from training.merge import merge

    torch.manual_seed(0)
    # Not started at nothing, as adapters are that still have to be trained.
    random = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapter, base = tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(model)
    peft.get_peft_model(base, random).save_pretrained(str(adapter))
    answers = [OwnAnswer(PROMPT, text, finished=True) for text in ("red", "blue green", "")]
    start, adapted = Policy(model), Policy(model, adapter=adapter)
    assert log_ratios(start, start, answers, "float32") == [0.0, 0.0, 0.0]
    merged = Policy(str(merge(model, adapter, tmp_path / "merged", "float32", card="")))
    moved = log_ratios(adapted, start, answers, "float32")
    assert all(ratio is not None and abs(ratio) > 0.01 for ratio in moved)
    assert log_ratios(merged, start, answers, "float32") == pytest.approx(moved, abs=1e-4)


def test_a_prompt_that_the_template_refuses_tells_nothing(
    policies: tuple[Policy, Policy],
) -> None:
    ours, _ = policies
    config = Path(ours.model) / "tokenizer_config.json"
    template = Path(ours.model) / "chat_template.jinja"
    assert template.exists() or "chat_template" in json.loads(config.read_text())
    refusing = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{% endfor %}"
    )
    template.write_text(refusing + template.read_text())
    asked = (Message("system", "be brief"), *PROMPT)
    found = log_ratios(
        *policies, [OwnAnswer(asked, "red", True), OwnAnswer(PROMPT, "red", True)], "float32"
    )
    assert found[0] is None
    assert found[1] is not None
