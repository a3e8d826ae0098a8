"""What a run's picture shows, beside what `test_settings` says of its lines."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from training.curve import HEIGHT, learning_curve


def drawn(lines: list[dict[str, Any]]) -> tuple[list[str], list[list[float]]]:
    """The words of the curves that are drawn, and each one's heights; larger is lower."""
    picture = ElementTree.fromstring(learning_curve(lines))
    words = [part.text or "" for part in picture.iter() if part.attrib.get("fill", "")[:1] == "#"]
    heights = [
        [float(point.split(",")[1]) for point in part.attrib["points"].split()]
        for part in picture.iter()
        if part.tag.endswith("polyline")
    ]
    return [word for word in words if word], heights


def test_where_answers_are_scored_score_and_kl_come_first() -> None:
    lines = [
        {"step": 1, "score": 0.5, "kl": 0.0, "loss": 2.0},
        {"step": 2, "score": 1.5, "kl": 3.0, "loss": 1.0},
        {"step": 2, "probe": {"win_rate": 0.75, "malformed": 0.0}},
    ]
    words, heights = drawn(lines)
    names = ["mean score", "KL from the reference", "training loss", "win rate", "malformed"]
    assert [name in word for name, word in zip(names, words, strict=True)] == [True] * 5
    score, kl, loss = heights[:3]
    # Score and KL rise, the loss falls, and each stands in a panel of its own below the last.
    assert score[0] - score[1] == pytest.approx(HEIGHT / 1.1, abs=0.1)
    assert kl[0] > kl[1] > score[0]
    assert loss[1] > loss[0] > kl[0]


def test_a_run_that_only_scores_has_no_panel_of_losses() -> None:
    words, heights = drawn([{"step": 1, "score": 0.5}, {"step": 2, "score": 0.6}])
    assert (words, len(heights)) == (["mean score of its answers"], 1)


def test_a_run_without_scores_has_its_losses_alone() -> None:
    words, _ = drawn([{"step": 1, "loss": 2.0, "eval_loss": 3.0}])
    assert words == ["training loss", "held-out loss"]
