"""The figures of an evaluation as rows: before and after, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from preferences.card import markdown_table


def evaluation_rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What was measured, before, after."""
    for name, (before, after) in summary["checks"].items():
        yield name.replace("_", " "), interval(before), interval(after)
    before, after = summary["truncated"]
    yield "answers cut short", f"{before:.1%}", f"{after:.1%}"
    before, after = summary["characters"]
    yield "mean characters", f"{before:,.0f}", f"{after:,.0f}"
    if summary.get("kl"):
        yield "KL from the first model, nats", "0", interval(summary["kl"])
    if summary["win_rate"]:
        yield f"win rate, by {summary['judge']}", "0.5", interval(summary["win_rate"])
    if summary.get("win_rate_at_equal_lengths"):
        yield "win rate at equal lengths", "0.5", interval(summary["win_rate_at_equal_lengths"])


def evaluation_table(summary: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    return markdown_table(["", "before", "after"], evaluation_rows(summary))


def interval(estimate: Mapping[str, Any] | None) -> str:
    """`0.532 ± 0.012`: the mean and half of its 95 % interval."""
    if estimate is None:
        return ""
    return f"{estimate['mean']:.3f} ± {(estimate['high'] - estimate['low']) / 2:.3f}"
