"""The one optimisation loop of the miniature, and the progress line."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable

import torch


def fit(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    loss_of_step: Callable[[int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
) -> float:
    """AdamW with a short warm-up, then cosine to 0; returns the seconds it took.

    Shows steps, rate, time left and the mean loss since the line before on standard error.
    """
    weights = list(parameters)
    optimizer = torch.optim.AdamW(weights, learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, steps))
    progress = Progress(name, steps)
    for step in range(steps):
        loss = loss_of_step(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.advance(loss.item())
    return progress.seconds


class Progress:
    """A line on standard error: redrawn on a terminal, one every ten seconds in a log."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self._started = self._shown = time.monotonic()
        self._losses: list[float] = []

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def advance(self, loss: float | None = None) -> None:
        """Count one step, and its loss where it has one."""
        self.done += 1
        if loss is not None:
            self._losses.append(loss)
        terminal = sys.stderr.isatty()
        last = self.done == self.total
        if not last and time.monotonic() - self._shown < (0.5 if terminal else 10):
            return
        rate = self.done / self.seconds
        minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
        line = (
            f"{self.name:<16} {self.done:>5}/{self.total}  {rate:6.2f} steps/s  "
            f"{minutes}:{seconds:02} left"
        )
        if self._losses:
            line += f"  loss {sum(self._losses) / len(self._losses):.4f}"
        end = "\n" if last or not terminal else ""
        print(("\r" if terminal else "") + line, end=end, file=sys.stderr, flush=True)
        self._shown = time.monotonic()
        self._losses.clear()


def _rate(step: int, steps: int, warmup: int = 30) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
