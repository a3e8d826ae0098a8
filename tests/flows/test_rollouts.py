"""The policy that trains is the one that vLLM samples, as it is at that moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flows.rollouts import sampler
from generation.engine import EngineRuntime
from tests.generation.tiny_model import write_adapter, write_model
from training.ppo import PPOConfig
from training.rollouts import Answer, sample_answers

pytest.importorskip("vllm")

RUNTIME = EngineRuntime(cpu_cache_gib=0.25)
PROMPTS = [tuple(range(40 + 7 * n, 52 + 9 * n)) for n in range(8)]
ALMOST_GREEDY: dict[str, Any] = {"temperature": 0.01, "max_tokens": 12, "seed": 3}


def with_adapter(base: Path, adapter: Path) -> Any:
    """The policy, by transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def furthest(policy: Any, answers: Sequence[Answer]) -> float:
    """How far below the likeliest token's logit an answer's token is, at most."""
    import torch

    found = 0.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([[*prompt, *answer.ids]])).logits[0]
        said = logits[len(prompt) - 1 : -1]
        own = said.gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
        found = max(found, float((said.max(-1).values - own).max()))
    return found


@pytest.mark.timeout(480)
def test_each_version_of_the_adapter_answers_as_transformers_has_it(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    versions = [write_adapter(tmp_path / f"{n}", base, seed=n) for n in (1, 2)]
    policies = [with_adapter(base, version) for version in versions]
    # Other tokens end an answer too: some that stand in the middle of answers.
    eos = json.loads((base / "config.json").read_text())["eos_token_id"]
    greedy: dict[str, Any] = {"ends": [eos], "pad": 0, "batch_size": 8, "bf16": False}
    without = sample_answers(policies[0], PROMPTS, **greedy, **ALMOST_GREEDY)
    ends = {eos, *(answer.ids[4] for answer in without[:3])}
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))

    policy = tmp_path / "policy"  # one folder, whose weights change from step to step
    rewarded = {"any": "a.py:b"}
    ppo = PPOConfig(model=str(base), reward_functions=rewarded, sampler="vllm", dtype="float32")
    with sampler(ppo, RUNTIME) as ask:
        assert ask is not None
        for version, policy_now, other in zip(versions, policies, policies[::-1], strict=True):
            shutil.copytree(version, policy, dirs_exist_ok=True)
            answers = ask(policy, PROMPTS, **ALMOST_GREEDY)
            # A logit 0.2 below another has e⁻²⁰ of its probability at this temperature.
            assert furthest(policy_now, answers) < 0.2
            assert furthest(other, answers) > 1
            for answer in answers:
                assert answer.finished == (answer.ids[-1] in ends)
                assert answer.finished or len(answer.ids) == 12
                assert not ends & set(answer.ids[:-1])
            assert version == versions[1] or {a.finished for a in answers} == {True, False}
        # The noise follows from the seed and the place.
        many = {"temperature": 1.0, "max_tokens": 12}
        drawn = [ask(policy, [PROMPTS[0]] * 4, **many, seed=seed) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert len({answer.ids for answer in drawn[0]}) > 1


def test_vllm_samples_lora_adapters_only() -> None:
    with pytest.raises(ValueError, match="sampler: vLLM puts LoRA adapters on, and weights are"):
        PPOConfig(model="m", reward_functions={"any": "a.py:b"}, sampler="vllm", weights="full")
