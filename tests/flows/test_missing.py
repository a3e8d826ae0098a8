"""A judge of whom too much cannot be read is told of, in the card and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.report import report_tables
from tests.flows.test_calibrated import build, card, write


def recipe(folder: Path, unreadable: int) -> Path:
    """100 replies of a judge, of which so many hold no verdict."""
    prompts = [f"question {n}" for n in range(100)]
    answers = [
        {"prompt": p, "model": m, "response": f"{m} of {p}"}
        for p in prompts
        for m in ("one", "two")
    ]
    replies: list[dict[str, Any]] = [
        {"prompt": p, "first": "one", "second": "two"}
        | {"reply": "I cannot say." if n < unreadable else "[[A]]"}
        for n, p in enumerate(prompts)
    ]
    text = {
        "name": "missing",
        "candidates": [
            {"kind": "import", "name": "answers", "source": write(folder / "a.jsonl", answers)}
        ],
        "judges": [
            {"kind": "import", "name": "judge", "verdict_in": "reply"}
            | {"source": write(folder / "r.jsonl", replies)}
        ],
        "pairs": {"min_probability": 0.5},
        "runtime": {"store": str(folder / "store")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(text))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(("unreadable", "is_told"), [(2, False), (7, True)])
def test_more_than_two_percent_missing_is_told(
    tmp_path: Path, unreadable: int, is_told: bool
) -> None:
    path = recipe(tmp_path, unreadable)
    words = f"judge: {unreadable} of 100 judgments are missing"
    assert (words in card(build(path))) == is_told
    printed = "\n".join(str(part) for part in report_tables(path, {}, None))
    assert (words in printed) == is_told
