"""What stands for a GPU's kernels in a rehearsal: they make and keep tensors of the same sizes.

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.shared_attention import Segments


class FourBit(nn.Linear):
    """Stands for bitsandbytes' 4-bit layer, whose packed tensors cannot be fake."""

    def __init__(self, layer: nn.Linear, keeps_inputs: bool) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.keeps_inputs = layer.weight, keeps_inputs
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        given = input.to(self.weight.dtype)
        return _unpacked_product(given, self.weight, self.keeps_inputs).to(input.dtype)  # type: ignore[no-any-return]


class _UnpackedProduct(torch.autograd.Function):
    """Each pass unpacks the weights anew; they need no gradient, so the input is not kept."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, keeps_inputs: bool) -> Tensor:
        ctx.weight = weight
        ctx.kept = given if keeps_inputs else None
        return nn.functional.linear(given, weight.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight = ctx.weight.clone()
        return gradients[0].to(weight.dtype) @ weight, None, None


_unpacked_product: Callable[..., Any] = _UnpackedProduct.apply


class _Tiled(torch.autograd.Function):
    """What `trl.kernels.ChunkedLogProbFunction` makes on a GPU, where a kernel of its own works on
    each tile in place; its way on a CPU makes several more of a tile's size."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, kind: torch.dtype) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.kind = kind
        tile = torch.empty(min(len(states), TOKEN_TILE), VOCABULARY_TILE, dtype=kind)
        part = weight[:VOCABULARY_TILE].to(kind)
        del tile, part
        return torch.empty(len(states), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        states, weight = ctx.saved_tensors
        of_states = torch.zeros(states.shape, dtype=torch.float32)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros(weight.shape, dtype=torch.float32)
        tile = torch.empty(min(len(states), TOKEN_TILE), VOCABULARY_TILE, dtype=ctx.kind)
        part = weight[:VOCABULARY_TILE].to(ctx.kind)
        del tile, part
        return of_states.to(states.dtype), of_weight, None


TOKEN_TILE, VOCABULARY_TILE = 4096, 32768
"""TRL's, of 1.16."""
tiled: Callable[..., Any] = _Tiled.apply


class _Attention(torch.autograd.Function):
    """What flash and memory-efficient attention keep: queries, keys, values, their result, and one
    number for each query (Dao 2023, "FlashAttention-2", alg. 1); never the weights of attention."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(query)
        per_query = torch.empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, per_query, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        gathered = torch.empty_like(query, dtype=torch.float32)  # alg. 2 adds dQ up in float32
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del gathered
        return *found, None


_attend: Callable[..., Any] = _Attention.apply


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `transformers.AttentionInterface` wants it."""
    groups = getattr(module, "num_key_value_groups", 1)
    if segments is not None:
        # One kernel for all; it is given the keys that each answer sees, one answer after another.
        read = torch.zeros(sum(segments.own) + sum(segments.shared), dtype=torch.long)
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        query, key, value = (
            query.contiguous(),
            key.index_select(0, read),
            value.index_select(0, read),
        )
        query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
        mask = None
    elif mask is not None:
        # The kernel that takes a mask wants it as numbers to add, and a key for every query head.
        mask = torch.zeros_like(mask, dtype=query.dtype)
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    out: Tensor = _attend(query, key, value, mask)
    return out.transpose(1, 2).contiguous(), None
