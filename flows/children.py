"""Work in processes of their own, none of which outlives the one that wants it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from preferences.errors import ServiceError

Result = TypeVar("Result")


def in_child(what: str, work: Callable[..., Result], *arguments: Any) -> Result:
    """Do a heavy piece of work in a process of its own, which gives its memory back when it ends.

    Raises ServiceError, saying what was done there, where the process was killed.
    """
    try:
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        with ProcessPoolExecutor(1, context, initializer=end_with_parent, initargs=(stop,)) as pool:
            try:
                return pool.submit(work, *arguments).result()
            except BaseException:
                stop.set()  # Told to end, this process would wait for all of the work.
                raise
    except BrokenProcessPool as error:
        raise ServiceError(
            f"{what} was killed, often for want of memory; a rerun goes on from what is kept"
        ) from error


def end_with_parent(stop: Event | None = None) -> None:
    """In the child: end when the process that wants the result is gone or wants it no more."""
    parent = multiprocessing.parent_process()
    over = stop or threading.Event()

    def watch() -> None:
        while parent is not None and os.getppid() == parent.pid and not over.wait(1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
