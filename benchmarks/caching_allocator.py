"""What PyTorch's caching allocator reserves of a GPU for tensors that come and go.

Memory reserved is what people see of a process. It is more than its tensors: a segment once taken
is kept, and a small tensor that lives on in a large segment keeps its hole from being whole again.
The rules are those of c10/cuda/CUDACachingAllocator.cpp (2.x, without expandable segments).
"""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB = 2**10, 2**20
SMALL = MIB
"""Tensors up to here share small segments of their own."""


@dataclass(eq=False)
class Block:
    """A stretch of a segment, with its neighbours."""

    size: int
    small: bool
    free: bool = True
    before: Block | None = None
    after: Block | None = None


class Allocator:
    """Hands out blocks; `reserved` is the most that was taken of the device, in bytes."""

    def __init__(self) -> None:
        self.reserved = 0
        self._free: list[Block] = []

    def take(self, size: float) -> Block:
        """A block for a tensor of so many bytes: the smallest that is free and large enough, cut to
        size, or one of a new segment."""
        wanted = max(-(-int(size) // 512) * 512, 512)
        small = wanted <= SMALL
        fitting = [b for b in self._free if b.small == small and b.size >= wanted]
        if fitting:
            block = min(fitting, key=lambda b: b.size)
            self._free.remove(block)
        else:
            block = Block(_segment(wanted), small)
            self.reserved += block.size
        rest = block.size - wanted
        if rest >= 512 if small else rest > SMALL:
            left = Block(rest, small, True, block, block.after)
            if block.after is not None:
                block.after.before = left
            block.size, block.after = wanted, left
            self._free.append(left)
        block.free = False
        return block

    def give(self, *blocks: Block) -> None:
        """Free them; free neighbours become one."""
        for block in blocks:
            block.free = True
            for other in (block.before, block.after):
                if other is not None and other.free:
                    self._free.remove(other)
                    block.size += other.size
                    if other is block.before:
                        block.before = other.before
                        if block.before is not None:
                            block.before.after = block
                    else:
                        block.after = other.after
                        if block.after is not None:
                            block.after.before = block
            self._free.append(block)


def _segment(size: int) -> int:
    if size <= SMALL:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
