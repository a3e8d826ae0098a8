"""Attention where several answers stand once behind the prompt that they share.

A group's first answer stands in the row as a whole, its prompt with it; of every other answer only
what it does not share with the first. So all tokens of a batch stand in one row, each once.
Attention goes segment by segment: the queries of an answer's own tokens on the keys of what it
shares and of these tokens, and on nothing else. Positions count from each answer's beginning, so a
token has the distance to every other that it would have without sharing.

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"
"""What a model's configuration calls this attention. Without segments it is `sdpa`."""


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Which tokens of a row see which, for N answers in groups of `answers`."""

    own: tuple[int, ...]
    """(N,) tokens that stand in the row for each answer, in the order they stand there."""
    shared: tuple[int, ...]
    """(N,) tokens of the group's first answer that each sees before its own; 0 for the first."""
    answers: int
    masks: dict[tuple[Any, ...], Tensor | None]
    """Made when first needed, and the same in all layers."""

    def mask(self, n: int, window: int | None, like: Tensor) -> Tensor | None:
        """(own, shared + own) of what is added to an answer's scores: 0 where it looks, −∞ where
        not. None where it looks at all that is before it, and nothing is shared."""
        own, shared = self.own[n], self.shared[n]
        key = own, shared, window, like.dtype, like.device
        if key not in self.masks:
            self.masks[key] = _mask(own, shared, window, like)
        return self.masks[key]

    def __iter__(self) -> Iterator[int]:
        return (n for n, own in enumerate(self.own) if own)


def _mask(own: int, shared: int, window: int | None, like: Tensor) -> Tensor | None:
    if not shared and (window is None or own <= window):
        return None
    seen = torch.ones(own, shared + own, dtype=torch.bool, device=like.device).tril(shared)
    if window is not None:
        seen = seen.triu(shared - window + 1)
    zeros = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill(~seen, float("-inf"))


def hidden_states(
    decoder: Any, input_ids: Tensor, position_ids: Tensor, segments: Segments
) -> Tensor:
    """(T, width), of a decoder's last layer; `input_ids` and `position_ids` have the shape (1, T),
    and the decoder's attention is `NAME`."""
    found: Tensor = decoder(
        input_ids=input_ids,
        position_ids=position_ids,
        # Taken for a mask that is made already, so that none is made of T × T places.
        attention_mask=torch.zeros(1, 1, 1, 1, device=input_ids.device),
        segments=segments,
        use_cache=False,
    ).last_hidden_state
    return found[0]


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """For `AttentionInterface`: `query` (1, heads, T, width), `key` and `value` (1, key heads, T,
    width); returns (1, T, heads, width).

    On CUDA in half precision it is torch's `varlen_attn`, elsewhere, and where that gives something
    else, one call of torch's scaled dot product a segment. Only the latter was run, on a CPU; of
    the former, what is put into it was checked on a CPU too.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **given
        )
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        heads = query.shape[1], key.shape[1], query.shape[3]
        if _kernel_agrees(heads, query.dtype, query.device):
            return _at_once(query, key, value, segments, scaling, sliding_window), None
    return _one_by_one(query, key, value, segments, scaling, sliding_window), None


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    own = list(segments.own)
    queries, keys, values = (torch.split(states, own, dim=2) for states in (query, key, value))
    seen = []
    for n in segments:
        first, shared = n - n % segments.answers, segments.shared[n]
        k, v = keys[n], values[n]
        if shared:
            k = torch.cat([keys[first][:, :, :shared], k], dim=2)
            v = torch.cat([values[first][:, :, :shared], v], dim=2)
        mask = segments.mask(n, window, query)
        seen.append(
            scaled_dot_product_attention(
                queries[n],
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(seen, dim=2).transpose(1, 2)


def _at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """By one kernel, whose causal mask is aligned at each segment's end."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, longest, read = _bounds(segments, query.device)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    found: Any = varlen_attn(
        q.contiguous(),
        k.index_select(0, read),
        v.index_select(0, read),
        queries,
        keys,
        *longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return found[None]  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1)  # the same in all layers
def _bounds(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Where each segment's queries and keys begin and end, the most a segment has of them, and the
    row's place of every key."""
    starts = [0]
    for own in segments.own:
        starts.append(starts[-1] + own)
    places, lengths = [], []
    for n in segments:
        first = starts[n - n % segments.answers]
        places += [*range(first, first + segments.shared[n]), *range(starts[n], starts[n + 1])]
        lengths.append(segments.shared[n] + segments.own[n])
    counts = [segments.own[n] for n in segments], lengths
    queries, keys = (torch.tensor([0, *sizes]).cumsum(0).int().to(device) for sizes in counts)
    return queries, keys, [max(sizes) for sizes in counts], torch.tensor(places).to(device)


@functools.cache
def _kernel_agrees(heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel gives on a small example what the segments do one by one.

    Older versions of torch and of GPUs do not have it, or not for every width.
    """
    of_queries, of_keys, width = heads
    segments = Segments((9, 3, 5), (0, 6, 4), 3, {})
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, number, 17, width, generator=draw).to(device, dtype)
        for number in (of_queries, of_keys, of_keys)
    )
    for window in (None, 4):
        expected = _one_by_one(query, key, value, segments, None, window)
        try:
            found = _at_once(query, key, value, segments, None, window)
        except (ImportError, RuntimeError, TypeError, ValueError):
            return False
        if not torch.allclose(found, expected, rtol=0, atol=0.05):
            return False
    return True


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
