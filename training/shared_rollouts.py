"""What models say of sampled answers, with every token computed once.

A batch's prompts and answers differ in length, and several answers may follow one prompt. Here they
stand in one row, each prompt once and without padding (`training.shared_attention`), and only
answers' tokens are scored. PPO reads policy, critic, reference and reward model in this way; RLOO
and GRPO call a model as TRL does, `model(input_ids, attention_mask, labels, fused_lm_head=True)`,
and get what TRL's forward pass would return. Where that is not known to be exact,
`training.shared_prefix.why_not` says so and this is not used.

This module imports trl at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from training.shared_attention import NAME, hidden_states
from training.shared_prefix import IGNORED, Shared, exchange_forward, head_of, shared, why_not


@dataclass(frozen=True, slots=True)
class Packed:
    """B rows of prompts and answers in one row, with N tokens of answers that are scored."""

    row: Shared
    before: Tensor
    """(N,), the place of the token before each scored one: its state decides that token."""
    targets: Tensor
    """(N,), the scored tokens, in the order of the rows."""
    ends: Tensor
    """(B,), the place of each row's last token."""


def packed(tokens: Tensor, present: Tensor, scored: Tensor) -> Packed:
    """Put rows side by side. All three have the shape (B, S): tokens, which of them are no padding,
    and which are an answer's; padding may stand at either side.

    Rows share what stands before their first scored token, where it is the same, and whatever
    their answers begin with alike.
    """
    order = present.int().argsort(dim=1, descending=True, stable=True)
    ids, real = tokens.gather(1, order), present.gather(1, order)
    rank = present.cumsum(1) - 1
    starts = rank.gather(1, scored.int().argmax(1, keepdim=True))[:, 0].tolist()
    prompts: dict[tuple[int, ...], list[int]] = {}
    for number, (start, line) in enumerate(zip(starts, ids.tolist(), strict=True)):
        prompts.setdefault(tuple(line[:start]), []).append(number)
    answers = max(map(len, prompts.values()))
    # All groups are made as large as the largest, by rows without any token.
    laid_out = torch.full((answers, len(prompts)), len(ids))
    for group, numbers in enumerate(prompts.values()):
        laid_out[: len(numbers), group] = torch.tensor(numbers)
    laid_out = laid_out.flatten().to(tokens.device)
    nothing = torch.zeros_like(ids[:1])
    row = shared(
        torch.cat([ids, nothing])[laid_out], torch.cat([real, nothing.bool()])[laid_out], answers
    )
    places = row.places[laid_out.argsort()[: len(ids)]]
    before = places.gather(1, (rank - 1).clamp(min=0))[scored]
    ends = places.gather(1, rank[:, -1:])[:, 0]
    return Packed(row, before, tokens[scored], ends)


def share(model: Any, temperature: float) -> str | None:
    """Make a causal language model, with its adapters if it has some, able to read packed rows, if
    that changes nothing but the time; if it does, why.

    Its head then divides logits by `temperature`, if it is called as TRL does; called in any other
    way, the model computes what it did.
    """
    reason = why_not(model)
    if reason is not None:
        return reason
    base = base_of(model)
    exchange_forward(base, functools.partial(_scored, temperature))
    return None


def shares(model: Any) -> bool:
    """Whether the model was made able to."""
    return getattr(base_of(model).config, "_attn_implementation", None) == NAME


def words(unshared: str | None) -> str:
    """What people are told about the forward pass, given what `share` returned."""
    if unshared is None:
        return "shared: each prompt once, no padding, answers' tokens scored"
    return f"with padding and repeated prompts: {unshared}"


def base_of(model: Any) -> Any:
    """The causal language model below the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def states_of(model: Any, batch: Packed) -> Tensor:
    """(T, hidden), the last states of the row's tokens, with whichever adapter is on."""
    row = batch.row
    return hidden_states(base_of(model).base_model, row.input_ids, row.position_ids, row.segments)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values at the N places where a mask is true, and 0 elsewhere; of the mask's shape."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _scored(
    temperature: float,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    use_cache: bool = False,
    **given: Any,
) -> FusedCausalLMOutput:
    others = [name for name, value in given.items() if value is not None]
    if others:
        raise TypeError(f"shared prompts know nothing of {', '.join(others)}")
    scored = labels != IGNORED
    batch = packed(input_ids, attention_mask.bool(), scored)
    hidden = states_of(model, batch).index_select(0, batch.before)
    scored = scored[:, 1:]  # no row begins with an answer
    log_probs, entropy = (
        spread(values, scored) for values in head_of(model, temperature)(hidden, batch.targets)[:2]
    )
    return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, label_mask=scored)
