"""Which forward pass a method's trainer takes, and the most that goes through it at once.

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from training import adapters, rehearsal
from training.memory import Examples
from training.models import is_quantised
from training.rehearsal import Head, Pass
from training.rewarded import RewardedConfig
from training.settings import TrainingConfig
from training.shared_attention import Segments

SHARED = ("dpo", "kto", "ranked_dpo", "reward", "ppo", "rloo", "grpo")
"""Methods that compute each token of a batch once, where `training.shared_prefix` allows it."""


def pass_of(config: TrainingConfig, model: Any, examples: Examples) -> tuple[Pass, Head]:
    """What goes through `model`, its configuration of transformers, and the head that reads it."""
    length = config.max_length
    longest = config.max_tokens if isinstance(config, RewardedConfig) else examples.answer
    answer = min(longest or length, length - 1)
    settings: dict[str, Any] = {
        "checkpointing": config.gradient_checkpointing,
        "autocast": config.dtype != "float32",
    }
    if shares(config, model):
        at_once = _examples_at_once(config, length + (examples.answers - 1) * answer)
        row = longest_row(at_once, examples.answers, length, answer)
        softcap = getattr(model.get_text_config(), "final_logit_softcapping", None)
        head = rehearsal.shared_head(at_once * examples.answers * answer, softcap)
        shown = Pass(1, sum(row.own), segments=row, **settings)
    else:
        rows = examples.answers * _examples_at_once(config, examples.answers * length)
        masked = rows > 1 or bool(getattr(config, "packing", False))
        head = rehearsal.fused_head
        shown = Pass(rows, length, padded=masked, **settings)
        if config.method == "ppo":
            head = rehearsal.full_head(answer)
    if config.method == "reward":
        head = rehearsal.no_head
    return shown, head


def longest_row(examples: int, answers: int, length: int, answer: int) -> Segments:
    """A batch with each token once: prompts with so many answers each, all at their longest."""
    own = (length, *[answer] * (answers - 1))
    shared = (0, *[length - answer] * (answers - 1))
    return Segments(own * examples, shared * examples, answers, {})


def shares(config: TrainingConfig, model: Any) -> bool:
    """Whether a run computes each token of its batches once."""
    if config.method not in SHARED or not getattr(config, "packing", True):
        return False
    if config.weights in ("prefix_tuning", "prompt_tuning"):
        return False
    from trl.trainer.utils import disable_dropout_in_model

    from training.shared_prefix import why_not

    # What the base is held in changes nothing here.
    kinds: dict[str, Any] = {"qlora": "lora", "qdora": "dora"}
    weights = kinds[config.weights] if is_quantised(config.weights) else config.weights
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        made = make(rehearsal.cut(model, 1))
        disable_dropout_in_model(made)
        made = adapters.put_on(made, config.model_copy(update={"weights": weights}))
    return why_not(made) is None


def _examples_at_once(config: TrainingConfig, tokens: int) -> int:
    """At most, where the longest example is so many tokens."""
    if config.batch_tokens is None:
        return config.batch_size
    return min(config.batch_size, math.ceil(config.batch_tokens / tokens))
