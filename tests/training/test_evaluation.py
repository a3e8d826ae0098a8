"""Intervals that know that pairs share prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.evaluation import clustered_share


def test_independent_pairs_have_the_wilson_interval() -> None:
    # 8 of 10, one pair a prompt; Wilson 1927 gives (0.490, 0.943). The residuals' variance with
    # its small-sample factor 10/9 is larger than p(1−p)/n by just that: n is 9, not 10.
    share = clustered_share([1.0] * 8 + [0.0] * 2, [str(i) for i in range(10)])
    z2 = 1.959964**2
    centre = (0.8 + z2 / 18) / (1 + z2 / 9)
    half = 1.959964 * (0.16 / 9 + z2 / (4 * 81)) ** 0.5 / (1 + z2 / 9)
    assert share.mean == pytest.approx(0.8)
    assert (share.low, share.high) == pytest.approx((centre - half, centre + half))


def test_pairs_of_one_prompt_that_agree_count_as_one() -> None:
    # Ten prompts with five equal verdicts each say no more than ten pairs do.
    alone = clustered_share([1.0] * 8 + [0.0] * 2, [str(i) for i in range(10)])
    repeated = clustered_share(([1.0] * 8 + [0.0] * 2) * 5, [str(i) for i in range(10)] * 5)
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))


def test_a_perfect_score_is_not_certainty() -> None:
    share = clustered_share([1.0] * 6, list("aabbcc"))
    # Wilson for 3 of 3 prompts: 3/(3 + z²).
    assert share.low == pytest.approx(3 / (3 + 1.959964**2))
    assert share.high == 1.0


def test_longer_wins_is_scored_on_the_same_pairs(model: str, tmp_path: Path) -> None:
    from tests.training.conftest import write_split
    from training.dpo import DPOConfig, train
    from training.evaluation import implicit_reward_accuracy

    write_split(tmp_path, "train", [("paint thing1", "red red", "blue")])
    pairs = [
        ("paint thing2", "red red", "blue"),
        ("paint thing3", "red", "blue blue"),
        ("paint thing4", "red red red", "blue"),
        ("paint thing5", "red", "blue"),
    ]
    write_split(tmp_path, "test", pairs)
    config = DPOConfig(
        model=model, dtype="float32", max_steps=1, learning_rate=1e-12, max_length=32, probe=None
    )
    train(config, tmp_path, tmp_path / "run", progress=lambda *_: None)
    scored = implicit_reward_accuracy(config, tmp_path / "run", tmp_path)
    assert (scored.pairs, scored.prompts) == (4, 4)
    # Longer wins twice, loses once, ties once: (1 + 0 + 1 + ½)/4.
    assert scored.longer_wins.mean == 0.625
