"""Train and test, by prompt: no prompt is ever on both sides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from preferences.config import Config
from preferences.errors import InputError
from preferences.fingerprint import fingerprint

Side = Literal["train", "test"]


class SplitConfig(Config):
    """How much is held out."""

    test: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts that is held out for testing."""
    seed: int = 0
    """Another seed, another split."""


def side(prompt_id: str, config: SplitConfig) -> Side:
    """Which side a prompt is on. It depends on the prompt alone, so it stays when others come."""
    draw = int(fingerprint([config.seed, prompt_id]), 16) / 16**20
    return "test" if draw < config.test else "train"


def require_both_sides(prompt_ids: Iterable[str], config: SplitConfig, name: str) -> None:
    """Raise InputError if either side would be empty."""
    sides = [side(prompt_id, config) for prompt_id in prompt_ids]
    for wanted in ("train", "test"):
        if wanted not in sides:
            raise InputError(
                f"{name}: {len(sides)} prompts are too few for `split.test: {config.test}`, "
                f"the {wanted} side is empty; add prompts or change the share"
            )
