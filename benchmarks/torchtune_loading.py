"""What torchtune of April 2024 reserves of a GPU while it makes and loads a QLoRA model.

Its code and torchao's of then were read, and every tensor that they make is taken here from an
allocator with PyTorch's rules (`caching_allocator`), in their order: a first layer is made in
bfloat16 and packed matrix by matrix; then embeddings and head; every layer is a copy of the first,
made by unpacking and packing it again; each weight of the checkpoint is packed on the GPU before
the one in its place goes. To pack is to write down the distances of all weights to all 16 levels.
"""

from __future__ import annotations

from caching_allocator import Allocator, Block

BF16, INT64 = 2, 8
BLOCK = 64
"""Weights that share a scale."""
LEVELS = 16


def reserved(matrices: list[int], layers: int, vocabulary: int, width: int) -> int:
    """Bytes, at most; `matrices` are the numbers of weights that a layer's have."""
    gpu = Allocator()
    first = []
    for n in matrices:
        weight = gpu.take(BF16 * n)
        first.append(_pack(gpu, n))
        gpu.give(weight)
    for _ in range(2):  # embeddings and head
        gpu.take(BF16 * vocabulary * width)
    made = []
    for _ in range(layers):
        for n in matrices:
            weight = _unpack(gpu, n)
            made.append(_pack(gpu, n))
            gpu.give(weight)
    for old in first:
        gpu.give(*old)
    for old, n in zip(made, matrices * layers, strict=True):
        weight = gpu.take(BF16 * n)
        _pack(gpu, n)
        gpu.give(weight, *old)
    return gpu.reserved


def _largest(gpu: Allocator, n: int) -> Block:
    """The largest of every 64 weights' absolute values."""
    absolute, largest = gpu.take(BF16 * n), gpu.take(BF16 * n // BLOCK)
    places = gpu.take(INT64 * n // BLOCK)
    gpu.give(absolute, places)
    return largest


def _pack(gpu: Allocator, n: int) -> list[Block]:
    """What of a packed matrix stays: scales, their own scales, and the weights."""
    blocks = n // BLOCK
    scales = _largest(gpu, n)
    centred = gpu.take(BF16 * blocks)
    gpu.give(scales)
    factors = gpu.take(BF16 * blocks)  # kept whole by the view that is used
    rounded = [gpu.take(BF16 * blocks) for _ in range(2)]
    kept = [factors, gpu.take(blocks)]
    gpu.give(centred, *rounded)

    scales, scaled = _largest(gpu, n), gpu.take(BF16 * n)
    differences = gpu.take(BF16 * LEVELS * n)
    distances = gpu.take(BF16 * LEVELS * n)
    gpu.give(differences)
    least, nearest = gpu.take(BF16 * n), gpu.take(INT64 * n)
    gpu.give(distances, least)
    high = gpu.take(INT64 * n // 2)
    both = gpu.take(INT64 * n // 2)
    gpu.give(high)
    kept.append(gpu.take(n // 2))
    gpu.give(both, nearest, scaled, scales)
    return kept


def _unpack(gpu: Allocator, n: int) -> Block:
    """The matrix in bfloat16."""
    half = n // 2
    made = []
    for _ in range(2):
        codes = gpu.take(half)
        made.append(gpu.take(INT64 * half))
        gpu.give(codes)
    made += [gpu.take(BF16 * half) for _ in range(2)]
    made.append(gpu.take(BF16 * n // BLOCK))
    for _ in range(2):
        repeated = gpu.take(BF16 * half)
        made.append(gpu.take(BF16 * half))
        gpu.give(repeated)
    weight = gpu.take(BF16 * n)
    gpu.give(*made)
    return weight
