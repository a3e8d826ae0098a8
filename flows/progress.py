"""Telling people how the work goes: a bar where somebody looks, lines where nobody does."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)

from generation.engine import Completion
from preferences.store import Manifest

LINE_SECONDS = 15.0
"""Between two lines where there is no terminal."""
SOME = 50
"""Fewer replies than this say nothing of the time left: the first waits for the engine's start."""


@dataclass
class Advance:
    """Counts what a stage has done. `total` is the stage's; `recorded` of `done` were on record."""

    total: int
    unit: str
    done: int = 0
    recorded: int = 0
    cost: float = 0.0
    started: float = field(default_factory=time.monotonic)
    stopped: float | None = None

    def by(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        # Where calls depend on replies, the total is a guess.
        self.total = max(self.total, self.done)

    def reply(self, completion: Completion, was_recorded: bool) -> None:
        """A call was answered, now or in an earlier run."""
        self.by(1)
        self.recorded += was_recorded
        if not was_recorded:
            self.cost += completion.cost or 0.0

    def comes_again(self, count: int) -> None:
        """So many of the replies counted will be read from the record once more, and count then."""
        self.done -= count
        self.recorded -= count

    @property
    def seconds(self) -> float:
        """From the stage's start to its end, or to now."""
        return (self.stopped or time.monotonic()) - self.started

    @property
    def rate(self) -> float:
        """New ones per second."""
        return (self.done - self.recorded) / max(self.seconds, 1e-9)

    def words(self) -> str:
        """`1,200 of 6,000 judgments, 310/s, 15 s left, $0.12`."""
        parts = [f"{self.done:,} of {self.total:,} {self.unit}", f"{self.rate:,.0f}/s"]
        if self.done - self.recorded > SOME and self.done < self.total:
            parts.append(f"{(self.total - self.done) / self.rate:,.0f} s left")
        if self.cost:
            parts.append(f"cost {self.cost:,.2f}")
        return ", ".join(parts)


Style = Literal["people", "json", "silent"]


class Progress:
    """Shows stages as they go. `timings` keeps seconds and calls of each for the report."""

    def __init__(self, style: Style = "silent", stream: TextIO | None = None) -> None:
        self.style = style
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False)
        self.timings: dict[str, Advance] = {}

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        """A stage with so many calls to make."""
        advance = _Shown(self, name, total, unit)
        self.timings[name] = advance
        with advance.shown():
            yield advance
        advance.stopped = time.monotonic()
        if self.style == "json":
            self.event("stage", name=name, done=advance.done, seconds=round(advance.seconds, 2))

    def say(self, text: str) -> None:
        """A line for people."""
        if self.style == "people":
            self._console.print(text, markup=False, soft_wrap=True)

    def finished(self, manifest: Manifest) -> None:
        """A stage's artifact is complete."""
        timing = self.timings.get(manifest.name)
        took = f" in {timing.seconds:.1f} s ({timing.rate:,.0f}/s)" if timing else ""
        reasons = manifest.summary.get("dropped", {})
        lost = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        dropped = f"; dropped {lost}" if lost else ""
        self.say(f"✓ {manifest.name}: {manifest.rows:,} rows{took}{dropped}")
        if self.style == "json":
            self.event("finished", **{k: v for k, v in asdict(manifest).items() if k != "config"})

    def event(self, kind: str, **values: Any) -> None:
        """A line for a machine."""
        print(json.dumps({"event": kind, **values}), file=self._stream, flush=True)


_CURRENT: ContextVar[Progress | None] = ContextVar("progress", default=None)


def current() -> Progress:
    """Who is told how the flow that runs here goes: whoever `telling` named, else Prefect's log."""
    return _CURRENT.get() or _Logged()


@contextmanager
def telling(progress: Progress) -> Iterator[None]:
    """Tell `progress` of all work in this block."""
    token = _CURRENT.set(progress)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class _Logged(Progress):
    """Tells Prefect's pages, where no terminal has started the flow."""

    def __init__(self) -> None:
        from prefect import get_run_logger

        super().__init__()
        self._log = get_run_logger()

    def say(self, text: str) -> None:
        """A line of the run's log."""
        self._log.info(text)


class _Shown(Advance):
    """An advance that is looked at while it goes."""

    def __init__(self, progress: Progress, name: str, total: int, unit: str) -> None:
        super().__init__(total, unit)
        self._progress, self._name = progress, name
        self._last = self.started
        self._bars: Bars | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw a bar in a terminal; elsewhere lines come from `by` and `reply`."""
        console = self._progress._console
        if self._progress.style != "people" or not console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=console, transient=True) as bars:
            self._bars = bars
            self._task = bars.add_task(self._name, total=self.total, rate="")
            try:
                yield
            finally:
                self._bars = None

    def by(self, count: int) -> None:
        super().by(count)
        self._show()

    def reply(self, completion: Completion, was_recorded: bool) -> None:
        super().reply(completion, was_recorded)
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if self._bars is not None:
            if now - self._last > 0.1:
                self._last = now
                cost = f" cost {self.cost:.2f}" if self.cost else ""
                self._bars.update(
                    self._task,
                    completed=self.done,
                    total=self.total,
                    rate=f"{self.rate:,.0f}/s{cost}",
                )
        elif now - self._last > LINE_SECONDS:
            self._last = now
            self._progress.say(f"  {self._name}: {self.words()}")
            if self._progress.style == "json":
                self._progress.event("progress", name=self._name, done=self.done, total=self.total)
