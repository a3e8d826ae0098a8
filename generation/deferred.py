"""An engine that starts when it is first asked: where all answers are on record, none starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from generation.engine import Completion, Engine, Request


class _Deferred:
    """Meets `Engine`."""

    def __init__(self, start: Callable[[], Engine]) -> None:
        self._start = start
        self._engine: Engine | None = None

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        if self._engine is None:
            self._engine = self._start()
        yield from self._engine.complete(requests)


@contextmanager
def deferred(opening: Callable[[], AbstractContextManager[Engine]]) -> Iterator[Engine]:
    """Open an engine at its first request, and close it at the end of the block."""
    with ExitStack() as stack:
        yield _Deferred(lambda: stack.enter_context(opening()))
