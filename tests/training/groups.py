"""Settings and rewards that tests of RLOO and GRPO share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preferences.records import Messages
from tests.training.conftest import THINGS, reds, write_split
from training.run import RunFolder, TrainingRuntime

EACH = TrainingRuntime(log_steps=1, save_steps=1)


def share_of_red(messages: Messages, answer: str) -> float:
    return reds(answer)


RED = {"red": share_of_red}


def settings_for(model: str) -> dict[str, Any]:
    """Of a configuration for the tiny model."""
    return {
        "model": model,
        "reward_functions": {"red": "colours.py:share_of_red"},
        "temperature": 0.8,
        "max_tokens": 10,
        "samples": 4,
        "rollouts": 16,
        "batch_size": 16,
        "max_length": 48,
        "max_steps": 1,
        "learning_rate": 2e-3,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "probe": None,
    }


def write_two_prompts(folder: Path) -> Path:
    write_split(folder, "train", [(f"paint {t}", "red", "blue") for t in THINGS[:2]])
    return folder


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in RunFolder(run).metrics() if "score" in line]
