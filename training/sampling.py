"""Sampling the model being trained, without disturbing its training."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, without the one that ends it."""
    finished: bool
    """It ended by itself and was not cut at the limit."""


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Collection[int],
    max_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    bf16: bool,
) -> list[Sample]:
    """One answer to each tokenized prompt; the same arguments give the same answers.

    Every batch has its own seed, so two policies sampled with one seed share their noise prompt by
    prompt, and two prompts never do. Random state and mode of the model are as before afterwards.
    """
    import torch
    from transformers import GenerationConfig

    # Every knob is set: what is left out would be filled from the model's own generation config.
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        use_cache=True,
        remove_invalid_values=True,  # a policy gone to NaN gives nonsense, to be seen, not a crash
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    device = model.device
    answers: list[Sample] = []
    with undisturbed(model), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, bf16):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            tokens, mask = left_padded(batch, tokenizer.pad_token_id, device)
            torch.manual_seed(seed + start)
            replies = model.generate(
                input_ids=tokens, attention_mask=mask, generation_config=generation
            )[:, tokens.shape[1] :]
            answers += [_answer(reply, tokenizer, ends) for reply in replies.tolist()]
    return answers


def left_padded(prompts: Iterable[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Tokenized prompts, (B, longest), filled up on the left, and a mask that is 1 at their tokens
    and 0 at padding."""
    import torch

    rows = [list(ids) for ids in prompts]
    width = max(map(len, rows))
    tokens = [[pad] * (width - len(ids)) + ids for ids in rows]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Inside, `model` is in evaluation mode; its mode and all random state come back after."""
    import numpy as np
    import torch

    modes = {name: module.training for name, module in model.named_modules()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _answer(ids: list[int], tokenizer: Any, ends: Collection[int]) -> Sample:
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[:stop]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Sample(text, tuple(kept), finished=stop is not None)
