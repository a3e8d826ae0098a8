"""Findings and differences of datasets, as tables for a terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from preferences.diff import Difference
from preferences.lint import LEVELS, Finding

STYLES = {"error": "bold red", "warning": "yellow", "info": ""}


def lint_table(dataset: str, findings: Sequence[Finding]) -> Table:
    """A row a finding: how grave, what, and what to do."""
    table = _table(f"{dataset}: {tally(findings)}", "level", "rule")
    table.add_column("count", justify="right")
    table.add_column("finding", overflow="fold")
    for finding in findings:
        words = Text(finding.detail)
        if finding.cure:
            words.append(f"; {finding.cure}")
        if finding.examples:
            words.append(f"\n{', '.join(finding.examples)}", style="dim")
        level = Text(finding.level, STYLES[finding.level])
        table.add_row(level, finding.rule.replace("_", " "), f"{finding.count:,}", words)
    return table


def lint_json(dataset: str, findings: Sequence[Finding]) -> str:
    """One object with all findings."""
    counts = {f"{level}s": _count(findings, level) for level in LEVELS[:2]}
    return json.dumps(
        {"dataset": dataset, **counts, "findings": [asdict(f) for f in findings]}, indent=1
    )


def tally(findings: Sequence[Finding]) -> str:
    """`2 errors, 1 warning`."""
    counts = [(level, _count(findings, level)) for level in LEVELS[:2]]
    return ", ".join(f"{n} {level}{'' if n == 1 else 's'}" for level, n in counts)


def diff_table(before: str, after: str, difference: Difference) -> Table:
    """A row a kind of change."""
    sizes = (
        f"{name}: {pairs:,} pairs of {prompts:,} prompts"
        for name, pairs, prompts in zip(
            (before, after), difference.pairs, difference.prompts, strict=True
        )
    )
    table = _table("\n".join(sizes), "change")
    table.add_column("count", justify="right")
    table.add_column("examples", overflow="fold")
    for change in difference.changes:
        words = Text("\n".join(change.examples), "dim")
        table.add_row(change.kind.replace("_", " "), f"{change.count:,}", words)
    return table


def diff_json(before: str, after: str, difference: Difference) -> str:
    """One object: the sizes of both, and every kind of change."""
    sides = {
        side: {"dataset": name, "pairs": pairs, "prompts": prompts}
        for side, name, pairs, prompts in zip(
            ("before", "after"), (before, after), difference.pairs, difference.prompts, strict=True
        )
    }
    return json.dumps({**sides, "changes": [asdict(c) for c in difference.changes]}, indent=1)


def _count(findings: Sequence[Finding], level: str) -> int:
    return sum(finding.level == level for finding in findings)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title, "bold"), title_justify="left")
    for column in columns:
        table.add_column(column)
    return table
