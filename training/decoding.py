"""Answers sampled token by token from a model that reads packed rows.

transformers' `generate` computes a prompt once for every answer to it, and goes on with answers
that have ended until the last one has. Here a prompt is computed once, and who has ended leaves the
batch. Model, cache and masks are the library's.

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from training.sampling import left_padded


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    pad: int,
    temperature: float,
    max_tokens: int,
) -> list[list[int]]:
    """An answer to each tokenized prompt, from the whole distribution at the temperature: tokens up
    to the first of `ends`, that one included, or as many as are allowed."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts]
    tokens, mask = left_padded(numbers, pad, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = DynamicCache(config=model.config)
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for number in range(max_tokens):
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        if number == 0 and len(numbers) < len(prompts):
            logits, mask = logits[rows], mask[rows]
            cache.batch_select_indices(torch.tensor(rows, device=mask.device))
        tokens = _drawn(logits, temperature)
        for answer, token in zip(going, tokens[:, 0].tolist(), strict=True):
            answers[answer].append(token)
        rows = [row for row, answer in enumerate(going) if answers[answer][-1] not in ends]
        if not rows:
            break
        if len(rows) < len(going):
            going = [going[row] for row in rows]
            tokens, mask = tokens[rows], mask[rows]
            cache.batch_select_indices(torch.tensor(rows, device=mask.device))
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
    return answers


def _drawn(logits: Tensor, temperature: float) -> Tensor:
    # A policy gone to NaN is reported where its loss is.
    chances = (logits.float() / temperature).nan_to_num().softmax(-1)
    return torch.multinomial(chances, 1)
