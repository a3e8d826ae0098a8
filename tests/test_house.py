"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("flows", "training", "judging", "generation", "preferences")
MAY_IMPORT = {
    "flows": {"training", "judging", "generation", "preferences"},
    "training": {"preferences"},
    "judging": {"preferences", "generation"},
    "generation": {"preferences"},
    "preferences": set(),
}
HOME = {
    "prefect": "flows",
    "trl": "training",
    "argilla": "judging/argilla",
    "vllm": "generation/vllm_engine.py",
}


def _files() -> Iterator[Path]:
    for room in ROOMS:
        yield from (ROOT / room).rglob("*.py")


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for module in _imports(file):
            other = module.split(".")[0]
            if other in ROOMS and other != room:
                assert other in MAY_IMPORT[room], f"{file} imports {module}"
                if room == "judging" and other == "generation":
                    assert module == "generation.engine", f"{file} imports {module}"


def test_each_heavy_library_has_one_home() -> None:
    for file in _files():
        for module in _imports(file):
            home = HOME.get(module.split(".")[0])
            if home is not None:
                place = file.relative_to(ROOT).as_posix()
                assert place.startswith(home), f"{place} imports {module}"


def test_the_command_line_pulls_in_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "vllm", "trl", "peft", "prefect", "argilla", "datasets"}
    code = "import sys, flows.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heavy.isdisjoint(done.stdout.split())
