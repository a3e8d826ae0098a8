"""vLLM in a child process of our own, which gives all its memory back when the engine is closed.

This is our end; `generation.vllm_engine.serve` is the child's, and `listen` its ear. One engine
serves any number of `complete` calls, also from several threads: their requests share vLLM's
running batch.

Between the two go, to the child: `(config, runtime)`, then `(call, requests)`, `(call, None)` for
a call given up, None for the end. From the child: `("ready", window)`, `("done", completions)`,
`("refused", (call, why))`, `("down", why)`.
"""

from __future__ import annotations

import itertools
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

from generation.engine import Completion, EngineConfig, EngineRuntime, Request, TokenRequest
from preferences.errors import InputError, PairwrightError, ServiceError

CHUNK = 64
"""Requests in one message to the child: few messages, and the first is soon on its way."""
GRACE_SECONDS = 10.0
"""How long vLLM may take to shut down before it is killed, when the engine is closed."""
ORPHAN_SECONDS = 2.0
"""The same when the parent is dead and nobody waits."""
LOG_LINES = 6

_COMMAND = "import sys; from generation.vllm_engine import serve; serve(*map(int, sys.argv[1:]))"


class VLLMEngine:
    """Meets `Engine`. `Completion.logprob` and `choice_probs` are the model's own, at temperature 1
    and before any mask or top_p.

    A sampled reply depends on its request's seed and not on the batch or the order, up to
    rounding: in float32 two sums differ by a millionth, in bfloat16 a near-tie can flip.
    Start-up raises ServiceError with vLLM's reason.
    """

    def __init__(self, config: EngineConfig, runtime: EngineRuntime) -> None:
        self._model = config.model
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._numbers = itertools.count()
        self._inboxes: dict[int, queue.SimpleQueue[list[Completion] | PairwrightError]] = {}
        self._down: str | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (the child writes it)
        self._connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _COMMAND, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=_child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        try:
            self._send((config, runtime))
            self._window = self._await_start()
        except BaseException:
            self.close()
            raise
        self._receiver.start()

    @property
    def pid(self) -> int:
        """The child, which leads the session of all that vLLM starts."""
        return self._process.pid

    def complete(self, requests: Iterable[Request | TokenRequest]) -> Iterator[Completion]:
        """Yield each completion in the step in which vLLM finishes it."""
        inbox: queue.SimpleQueue[list[Completion] | PairwrightError] = queue.SimpleQueue()
        with self._lock:
            if self._down is not None:
                raise ServiceError(self._down)
            call = next(self._numbers)
            self._inboxes[call] = inbox
        waiting = iter(requests)
        owed = 0
        try:
            while True:
                # Twice what runs at once is enough to keep the batch full; the rest stays here.
                while owed <= self._window - CHUNK:
                    chunk = list(itertools.islice(waiting, CHUNK))
                    if not chunk:
                        break
                    owed += len(chunk)
                    self._send((call, chunk))
                if not owed:
                    return
                answer = inbox.get()
                if isinstance(answer, PairwrightError):
                    raise answer
                for completion in answer:
                    owed -= 1
                    yield completion
        finally:
            with self._lock:
                del self._inboxes[call]
            if owed:
                with suppress(ServiceError):
                    self._send((call, None))

    def close(self) -> None:
        """End the child and everything it started; waits until they are gone."""
        with suppress(ServiceError):
            self._send(None)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS + 2)
        # Also what a dead child may have left: its session is its process group.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._receiver.ident is not None:
            self._receiver.join()
        self._connection.close()
        self._log.close()

    def _send(self, message: Any) -> None:
        with self._send_lock:
            try:
                self._connection.send(message)
            except OSError as error:
                raise ServiceError(self._down or self._obituary()) from error

    def _next_message(self) -> tuple[str, Any]:
        while not self._connection.poll(1.0):
            # A grandchild may hold the pipe open after the child has died.
            if self._process.poll() is not None and not self._connection.poll(0):
                raise EOFError
        message: tuple[str, Any] = self._connection.recv()
        return message

    def _await_start(self) -> int:
        try:
            kind, content = self._next_message()
        except (EOFError, OSError):
            kind, content = "down", None
        if kind == "ready":
            return int(content)
        if kind == "refused":
            raise InputError(content[1])
        raise ServiceError(self._obituary(content))

    def _receive(self) -> None:
        reason: str | None = None
        with suppress(EOFError, OSError):
            while True:
                kind, content = self._next_message()
                if kind == "done":
                    by_call: dict[int, list[Completion]] = {}
                    for call, completion in content:
                        by_call.setdefault(call, []).append(completion)
                    for call, completions in by_call.items():
                        self._deliver(call, completions)
                elif kind == "refused":
                    self._deliver(content[0], InputError(content[1]))
                else:
                    reason = content
        with self._lock:
            self._down = self._obituary(reason)
            for inbox in self._inboxes.values():
                inbox.put(ServiceError(self._down))

    def _deliver(self, call: int, answer: list[Completion] | PairwrightError) -> None:
        with self._lock:
            inbox = self._inboxes.get(call)
        if inbox is not None:  # Else the call was given up in the meantime.
            inbox.put(answer)

    def _obituary(self, reason: str | None = None) -> str:
        if reason is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 8000))
            lines = self._log.read().decode(errors="replace").splitlines()
            last = [line.strip() for line in lines if line.strip()][-LOG_LINES:]
            reason = f"exit code {self._process.returncode}; its last words: " + " | ".join(last)
        return (
            f"vLLM with {self._model} ended: {reason}; what was answered is kept, so mend this "
            "and run again (VLLM_LOGGING_LEVEL=INFO says more)"
        )


def _child_environment() -> dict[str, str]:
    environment = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that wait for each other spin for 30 times as long by default, which on a CPU
        # shared with anything else makes a small model five times slower.
        "GOMP_SPINCOUNT": "10000",
    }
    environment |= os.environ
    environment["VLLM_NO_USAGE_STATS"] = "1"
    # The cache's size is an argument here, in bytes; this older setting would override it.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def listen(connection: Connection, parent: int, inbox: queue.SimpleQueue[Any]) -> None:
    """The child's ear: passes messages on, and after the last ends the child and all of its
    session, whatever it is doing then.
    """
    grace = ORPHAN_SECONDS
    with suppress(EOFError, OSError):
        while True:
            # A fork of the parent may hold the pipe open after the parent has died.
            while not connection.poll(1.0):
                if os.getppid() != parent:
                    raise EOFError
            message = connection.recv()
            if message is None:
                grace = GRACE_SECONDS
                break
            inbox.put(message)
    inbox.put(None)
    time.sleep(grace)
    os.killpg(0, signal.SIGKILL)
