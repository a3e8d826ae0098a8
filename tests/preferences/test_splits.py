"""Train and test."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preferences.errors import InputError
from preferences.splits import SplitConfig, require_both_sides, side
from tests.preferences.strategies import PROMPT_IDS


def ids(count: int) -> list[str]:
    return [sha256(str(n).encode()).hexdigest()[:20] for n in range(count)]


def test_the_held_out_share_is_what_was_asked_for() -> None:
    config = SplitConfig(test=0.2)
    held_out = sum(side(prompt_id, config) == "test" for prompt_id in ids(5000))
    # Four binomial standard deviations are 4 * sqrt(5000 * 0.2 * 0.8) = 113.
    assert 1000 - 113 <= held_out <= 1000 + 113


@given(PROMPT_IDS, st.floats(0.01, 0.98))
def test_a_larger_test_share_only_adds_to_the_test_side(prompt_id: str, share: float) -> None:
    if side(prompt_id, SplitConfig(test=share)) == "test":
        assert side(prompt_id, SplitConfig(test=share + 0.01)) == "test"


def test_a_prompt_stays_on_its_side_when_others_are_added() -> None:
    config = SplitConfig()
    few = {p: side(p, config) for p in ids(100)}
    many = {p: side(p, config) for p in reversed(ids(1000))}
    assert all(many[p] == few[p] for p in few)


def test_another_seed_is_another_split() -> None:
    sides = [[side(p, SplitConfig(test=0.5, seed=seed)) for p in ids(64)] for seed in (0, 1)]
    assert sides[0] != sides[1]


def test_an_empty_side_is_refused_with_a_cure() -> None:
    with pytest.raises(InputError, match="add prompts or change the share"):
        require_both_sides(ids(1), SplitConfig(), "recipe")
    require_both_sides(ids(200), SplitConfig(), "recipe")
