"""The real Argilla server on this machine: its web pages, database, search and queue.

All its data is in one folder. Nothing of it outlives the process that started it, however that
ends, and the next start goes on with all datasets, answers, users and sessions.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal, NoReturn
from urllib.parse import quote

import httpx

from judging.argilla.environment import argilla_python
from preferences.errors import InputError, ServiceError

START_SECONDS = 120.0
STOP_SECONDS = 12.0
"""Longer than the server takes to end by itself or to kill what does not."""
WORKSPACE = "pairwright"


@dataclass(frozen=True)
class Account:
    """Somebody who may sign in with a password, or with an API key from a program."""

    username: str
    role: Literal["owner", "admin", "annotator"]
    password: str
    api_key: str


@dataclass(frozen=True)
class Address:
    """Where the server answers."""

    url: str
    created: tuple[Account, ...]
    """The accounts of a folder's first start: the only time that their passwords are known."""


def serve(home: Path, host: str, port: int) -> None:
    """Serve Argilla until Ctrl-C or SIGTERM, telling people where and with which accounts.

    Raises ServiceError if the server ends by itself.
    """
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        with _started(home, host, port, _say) as (address, process):
            _say(f"Argilla: {address.url}")
            if address.created:
                _say(told_once(address.created))
            _say("Ctrl-C stops it.")
            process.wait()
            raise _ended(home)
    except KeyboardInterrupt:
        _say("Stopped.")


@contextmanager
def running(
    home: Path,
    host: str = "127.0.0.1",
    port: int = 6900,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Address]:
    """The server, for as long as the block lasts. Port 0 takes any that is free.

    Raises InputError if the port or the folder is in use, ServiceError if it does not start.
    """
    with _started(home, host, port, say) as (address, _):
        yield address


def running_at(home: Path) -> tuple[str, str] | None:
    """URL of the server that runs on this folder, and an owner's API key; None where none runs."""
    address, lock = home / "address", home / "lock"
    if not (address.exists() and lock.exists()):
        return None
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            url = address.read_text()
        else:
            return None  # A server that was killed could not remove its address.
    if not answers(url):
        return None
    # The database has the keys themselves; so who can read this folder needs no other secret.
    database = f"file:{quote(str(home / 'argilla.db'))}?mode=ro"
    with closing(sqlite3.connect(database, uri=True)) as connection:
        owner = "SELECT api_key FROM users WHERE role = 'owner' ORDER BY inserted_at LIMIT 1"
        found = connection.execute(owner).fetchone()
    return (url, str(found[0])) if found else None


def answers(url: str) -> bool:
    """Whether an Argilla server answers there."""
    try:
        reply = httpx.get(f"{url}/api/v1/version", timeout=5, trust_env=False)
        return reply.status_code == 200 and "version" in reply.json()
    except (httpx.HTTPError, ValueError):
        return False


@contextmanager
def _started(
    home: Path, host: str, port: int, say: Callable[[str], None]
) -> Iterator[tuple[Address, subprocess.Popen[bytes]]]:
    python = argilla_python(say)
    home = home.resolve()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    told = home / "accounts-told"
    # A start that was interrupted has told nobody: then they get new passwords.
    accounts = () if told.exists() else _new_accounts()
    # The folder first: the worker of a server that was killed holds the port a little longer.
    with _owned(home) as lock, _bound(host, port) as listener, _log(home).open("ab") as log:
        say("Starting Argilla …")
        process = subprocess.Popen(
            [python, Path(__file__).with_name("launch.py"), str(listener.fileno()), home],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=home,
            env=_environment(home),
            # The server listens and holds the lock: a successor waits until it is gone.
            pass_fds=(listener.fileno(), lock.fileno()),
            start_new_session=True,  # Ctrl-C is ours to pass on.
            umask=0o077,
        )
        port = listener.getsockname()[1]
    try:
        url = _url(host, port)
        _await_ready(process, accounts, url, home)
        told.touch()
        (home / "address").write_text(url)
        yield Address(url, accounts), process
    finally:
        (home / "address").unlink(missing_ok=True)
        _stop(process)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on that port. Taken here, so nobody else can have it when the server listens."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(
            f"--host {host}: {error.strerror}; name an address of this machine"
        ) from error
    with closing(listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
        except OSError as error:
            raise InputError(
                f"port {port} on {host} cannot be used ({error.strerror}); stop what uses it, or "
                "choose another with --port"
            ) from error
        yield listener


@contextmanager
def _owned(home: Path) -> Iterator[IO[bytes]]:
    """The folder's lock, which one server at a time can have."""
    with (home / "lock").open("ab") as lock:
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                # The server of a process that was killed is gone within seconds.
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{home}: an Argilla server is running on this folder; stop it, or choose "
                        "another with --home"
                    ) from error
                time.sleep(0.2)
        yield lock


def _environment(home: Path) -> dict[str, str]:
    # Settings meant for another server or for our own interpreter are not this server's.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ARGILLA_", "PYTHON"))}
    return {
        **inherited,
        "ARGILLA_HOME_PATH": str(home),
        "ARGILLA_SEARCH_ENGINE": "sqlite",
        "ARGILLA_AUTH_SECRET_KEY": _secret(home),
        "ARGILLA_CORS_ORIGINS": "[]",
        "ARGILLA_DATABASE_SQLITE_TIMEOUT": "30",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TMPDIR": str(_fresh(home / "server-tmp")),
    }


def _secret(home: Path) -> str:
    """The key that signs sessions: kept, or every restart would sign everybody out."""
    path = home / "secret"
    if not path.exists():
        new = home / "secret.new"
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        new.rename(path)
    return path.read_text()


def _fresh(folder: Path) -> Path:
    """An empty folder: every start of the server leaves a copy of its pages in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _new_accounts() -> tuple[Account, ...]:
    roles: tuple[Literal["owner", "admin", "annotator"], ...] = ("owner", "admin", "annotator")
    return tuple(
        Account(role, role, secrets.token_urlsafe(12), secrets.token_urlsafe(32)) for role in roles
    )


def _await_ready(
    process: subprocess.Popen[bytes], accounts: tuple[Account, ...], url: str, home: Path
) -> None:
    """Hand the server its accounts and wait until it answers."""
    assert process.stdin is not None
    wanted = [{**asdict(account), "workspace": WORKSPACE} for account in accounts]
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(wanted).encode() + b"\n")
        process.stdin.flush()
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if process.poll() is not None:
            raise _ended(home)
        if time.monotonic() > deadline:
            raise ServiceError(
                f"the Argilla server did not answer in {START_SECONDS:.0f} s; see {_log(home)}"
            )
        time.sleep(0.2)


def _ended(home: Path) -> ServiceError:
    last = _log(home).read_text(errors="replace").strip().splitlines()[-1:]
    return ServiceError(f"the Argilla server ended ({''.join(last)}); see {_log(home)}")


def _log(home: Path) -> Path:
    return home / "server.log"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe, which is how the server is asked to end; then insist."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _url(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on `host`."""
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host)
    return f"http://{here or (f'[{host}]' if ':' in host else host)}:{port}"


def told_once(accounts: tuple[Account, ...]) -> str:
    """The accounts of a first start, as people are to read them."""
    lines = [
        "Accounts, shown this once (change passwords and add people under My settings / Users):",
        *(f"  {a.username:<10} password {a.password}   API key {a.api_key}" for a in accounts),
    ]
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, flush=True)


def _as_interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
