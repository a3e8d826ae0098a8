"""More processes for stages that do nothing but compute: each takes shards that nobody holds."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from flows.children import end_with_parent
from flows.plan import Plan
from flows.progress import Progress
from flows.run import Make, Run
from preferences.errors import ServiceError
from preferences.sharing import work_through
from preferences.store import Artifact, Shard, Store

WORTH = 16
"""Shards for each process; with fewer, starting another takes longer than it saves."""


def work_together(
    run: Run,
    artifact: Artifact,
    name: str,
    owed: Sequence[Shard],
    making: Callable[[Run], Make],
    kind: str = "part",
) -> None:
    """Have every owed shard made, by as many processes as there are cores and work for.

    `making` gives what makes a shard; it is a function of a module, so that another process finds
    it. What goes wrong in a helper is left to this process, which makes the shard and meets it too.
    """
    with _helpers(run, artifact, owed, making, kind):
        work_through(run.store, artifact, owed, run.wrap(name, making(run)), kind)


@contextmanager
def _helpers(
    run: Run, artifact: Artifact, owed: Sequence[Shard], making: Callable[[Run], Make], kind: str
) -> Iterator[None]:
    # On a bucket the network is what is waited for, and a store in memory is this process's own.
    many = min(os.cpu_count() or 1, len(owed) // WORTH) - 1 if run.store.is_local else 0
    context = multiprocessing.get_context("spawn")
    # From the other end, so that they meet late.
    arguments = (run.plan, run.store.url, run.shards, artifact, owed[::-1], making, kind)
    started = [context.Process(target=_help, args=arguments, daemon=True) for _ in range(many)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.join()


def _help(
    plan: Plan,
    url: str,
    shards: Sequence[Shard],
    artifact: Artifact,
    owed: Sequence[Shard],
    making: Callable[[Run], Make],
    kind: str,
) -> None:
    """In the helper: make what nobody else makes, as long as somebody wants it."""
    end_with_parent()
    run = Run(plan, Store(url), Progress(), shards=shards)
    with suppress(ServiceError):
        work_through(run.store, artifact, owed, making(run), kind)
