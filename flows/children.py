"""Work in processes of their own, none of which outlives the one that wants it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from preferences.errors import InputError, ServiceError

Result = TypeVar("Result")

GRACE_SECONDS = 5.0
"""How long after one process failed the cause is waited for: it may be that another one died."""


def in_child(what: str, work: Callable[..., Result], *arguments: Any) -> Result:
    """Do a heavy piece of work in a process of its own, which gives its memory back when it ends.

    Raises ServiceError, saying what was done there, where the process was killed.
    """
    return in_children(what, 1, work, *arguments)


def in_children(what: str, number: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """The same in several processes at once, of which each has its place in the environment, by
    torchrun's names; what the first one gives. If one fails or is killed, all end."""
    try:
        context = multiprocessing.get_context("spawn")
        # Not an event: to set one that a killed process was waiting for never ends.
        stop, wanted = context.Pipe(duplex=False)
        with (
            stop,
            wanted,
            ProcessPoolExecutor(
                number, context, initializer=end_with_parent, initargs=(stop,)
            ) as pool,
        ):
            try:
                futures = [
                    pool.submit(_placed, place, work, *arguments) for place in _places(number)
                ]
                return _first(futures)
            except BaseException:
                wanted.close()  # Told to end, this process would wait for all of the work.
                raise
    except BrokenProcessPool as error:
        raise ServiceError(
            f"{what} was killed, often for want of memory; a rerun goes on from what is kept"
        ) from error


def _places(number: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many processes on one machine; nothing to a single one."""
    if number == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max((os.cpu_count() or 1) // number, 1)
    shared = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # Or the reducer tells each process that no parameter was left unused.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    return [{**shared, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(number)]


def _placed(place: Mapping[str, str], work: Callable[..., Result], *arguments: Any) -> Result:
    os.environ.update(place)
    return work(*arguments)


def _first(futures: Sequence[Future[Result]]) -> Result:
    """What the first gives; where any fails, the error that began it."""
    done, going = wait(futures, return_when=FIRST_EXCEPTION)
    failures = [failure for future in done if (failure := future.exception()) is not None]
    if failures and not any(isinstance(f, InputError | ServiceError) for f in failures):
        # One that loses another fails too, and often sooner than it is known that the other died.
        done |= wait(going, timeout=GRACE_SECONDS).done
        failures = [failure for future in done if (failure := future.exception()) is not None]
    for kind in (InputError, ServiceError, BrokenProcessPool, BaseException):
        for failure in failures:
            if isinstance(failure, kind):
                raise failure
    return futures[0].result()


def end_with_parent(stop: Connection | None = None) -> None:
    """In the child: end when the process that wants the result is gone or closes its end of `stop`,
    wanting it no more."""
    parent = multiprocessing.parent_process()
    over = stop.poll if stop is not None else threading.Event().wait

    def watch() -> None:
        while parent is not None and os.getppid() == parent.pid and not over(1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
