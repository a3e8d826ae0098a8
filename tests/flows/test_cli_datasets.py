"""`pairwright lint` and `pairwright diff`, as they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAIRWRIGHT = [sys.executable, "-c", "from flows.cli import main; main()"]


def pairwright(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PAIRWRIGHT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "160"},
    )


def write(path: Path, *pairs: tuple[str, str], **more: Any) -> Path:
    rows = [
        {"prompt": f"Question {n}?", "chosen": chosen, "rejected": rejected, **more}
        for n, (chosen, rejected) in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lint_of_a_good_dataset_exits_0_and_of_a_bad_one_1(tmp_path: Path) -> None:
    good = pairwright("lint", write(tmp_path / "good.jsonl", ("yes", "no"), ("no", "yes")))
    assert (good.returncode, good.stderr) == (0, "")
    assert "0 errors, 0 warnings" in good.stdout
    # Text in brackets is text, not the terminal's mark-up.
    path = write(tmp_path / "bad.jsonl", ("yes", "yes"), ("a", "b"), category="[red]x[/blue]")
    bad = pairwright("lint", path)
    assert (bad.returncode, bad.stderr) == (1, "")
    assert "1 error, 0 warnings" in bad.stdout
    assert "equal answers" in bad.stdout
    assert "bad.jsonl:1" in bad.stdout
    assert "[red]x[/blue] 2" in bad.stdout


def test_lint_as_json_holds_the_findings_for_a_machine(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", ("yes", "yes"), ("a" * 30, "b"))
    done = pairwright("lint", path, "--json", "--max-characters", "20")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["dataset"], found["errors"], found["warnings"]) == (str(path), 1, 1)
    assert found["findings"][0] == {
        "level": "error",
        "rule": "equal_answers",
        "count": 1,
        "detail": "chosen and rejected are the same up to white space",
        "cure": "remove them: they teach nothing",
        "examples": ["bad.jsonl:1"],
    }
    assert found["findings"][1]["rule"] == "too_long"


@pytest.mark.parametrize(
    "call", [["lint", "nowhere"], ["lint"], ["lint", "x", "--max-characters", "0"], ["diff", "x"]]
)
def test_a_wrong_call_exits_2_without_a_traceback(call: list[str]) -> None:
    done = pairwright(*call)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_diff_shows_what_changed_and_as_json_too(tmp_path: Path) -> None:
    before = write(tmp_path / "a.jsonl", ("yes", "no"), ("up", "down"))
    after = write(tmp_path / "b.jsonl", ("no", "yes"), ("up", "down"), ("in", "out"))
    shown = pairwright("diff", before, after)
    assert (shown.returncode, shown.stderr) == (0, "")
    told = "".join(shown.stdout.split())  # Wherever the lines are broken.
    assert "a.jsonl:2pairsof2prompts" in told
    assert "b.jsonl:3pairsof3prompts" in told
    found = json.loads(pairwright("diff", before, after, "--json").stdout)
    assert found["before"] == {"dataset": str(before), "pairs": 2, "prompts": 2}
    assert found["after"] == {"dataset": str(after), "pairs": 3, "prompts": 3}
    changes = {change["kind"]: change for change in found["changes"]}
    assert changes["pairs_flipped"]["examples"] == ["b.jsonl:1"]
    assert {kind: c["count"] for kind, c in changes.items() if c["count"]} == {
        "prompts_added": 1,
        "pairs_added": 1,
        "pairs_flipped": 1,
        "unchanged": 1,
    }
