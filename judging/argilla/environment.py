"""The Argilla server's own Python environment, made on first use.

The server needs older versions of libraries that Pairwright needs too, so it never shares one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

from filelock import FileLock

from preferences.errors import ServiceError
from preferences.fingerprint import fingerprint

EVERY = 20
"""Packages between two lines of progress."""


def argilla_python(say: Callable[[str], None]) -> Path:
    """The interpreter of Argilla's environment; the environment is made if it is not there.

    It lies in the user's cache under the hash of its lock, so another version of the lock makes
    another one. Made whole beside its place and moved there, it exists only if it is complete.
    Raises ServiceError if pip could not make it.
    """
    lock = resources.files("judging.argilla").joinpath("argilla.lock").read_text(encoding="utf-8")
    version = "{}.{}".format(*sys.version_info)
    folder = _cache() / f"argilla-{fingerprint([lock, version])}"
    python = folder / "bin" / "python"
    if not python.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            # Another process may have made it while this one waited.
            if not python.exists():
                _make(folder, lock, say)
    return python


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairwright"


def _make(folder: Path, lock: str, say: Callable[[str], None]) -> None:
    for left in folder.parent.glob(f"{folder.name}.building-*"):
        shutil.rmtree(left, ignore_errors=True)
    # A name of its own: pip may still write for a process that was killed.
    building = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    packages = lock.count("==")
    say(
        f"Making Argilla's own environment in {folder}: {packages} packages, 500 MB, "
        "about a minute. This is done once."
    )
    log = folder.with_name(f"{folder.name}.log")
    requirements = folder.with_name(f"{folder.name}.txt")
    requirements.write_text(lock, encoding="utf-8")
    try:
        with log.open("w", encoding="utf-8") as lines:
            _run([sys.executable, "-m", "venv", str(building)], lines.write, log)
            install = [
                *(str(building / "bin" / "python"), "-m", "pip", "install", "--no-deps"),
                *("--disable-pip-version-check", "--progress-bar", "off", "-r", str(requirements)),
            ]
            _run(install, _counted(packages, say, lines.write), log)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    # Scripts in bin/ still name the old place, so nothing of it is run but bin/python.
    building.rename(folder)
    requirements.unlink()
    say("Argilla's environment is ready.")


def _run(command: list[str], hear: Callable[[str], object], log: Path) -> None:
    """Run a command; each line it prints is handed to `hear`."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    told = deque[str](maxlen=50)
    try:
        for line in process.stdout:
            hear(line)
            told.append(line)
    except BaseException:
        process.terminate()
        raise
    finally:
        code = process.wait()
    if code:
        raise ServiceError(
            f"Argilla's environment could not be made: {_reason(told)}; see {log}, mend pip's "
            "access to its packages, and run the same again"
        )


def _counted(
    packages: int, say: Callable[[str], None], write: Callable[[str], object]
) -> Callable[[str], None]:
    """Passes pip's lines on, and now and then says how many packages it has."""
    found = 0

    def hear(line: str) -> None:
        nonlocal found
        write(line)
        if line.startswith("Collecting "):
            found += 1
            if found % EVERY == 0:
                say(f"  {found} of {packages} packages")
        elif line.startswith("Installing collected packages"):
            say("  installing")

    return hear


def _reason(lines: Iterable[str]) -> str:
    """pip's first complaint, or the last it said, in one line."""
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if re.match(r"(?i)error", line)]
    return errors[0] if errors else "".join(said[-1:]) or "no output"
