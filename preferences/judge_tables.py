"""How judges judged and agree, as tables for the card and for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from preferences.store import Manifest

Facts = Mapping[str, Any]
"""A record of `judging.agreement`, as a manifest's summary holds it."""
MAX_ROWS = 60
"""Of one table; a hundred annotators in ten categories are for the manifest, not for readers."""


@dataclass(frozen=True)
class NamedTable:
    """A table of texts under a title."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def judge_tables(agreement: Facts, costs: Mapping[str, float]) -> list[NamedTable]:
    """Of all prompts, then by category; tables without rows and empty columns are left out.

    `costs` are by the name of the judge, in the currency of the recipe's prices.
    """
    nobody = "" if agreement["between"] else "No pair was judged by two raters."
    tables = []
    for by_category in (False, True):
        tables += [
            _table("Judges", _JUDGES, agreement["raters"], partial(_rater, costs), by_category),
            _table("Agreement", _BETWEEN, agreement["between"], _between, by_category),
            _table("Reliability", _ALPHA, agreement["reliability"], _reliability, by_category),
        ]
    notes = {"Judges": nobody, "Agreement": _BETWEEN_NOTE, "Reliability": _ALPHA_NOTE}
    return [replace(t, note=f"{notes.get(t.title, '')} {t.note}".strip()) for t in tables if t.rows]


def judge_costs(stages: Iterable[Manifest]) -> dict[str, float]:
    """What each judge cost, by its name, where it cost anything."""
    facts = {m.name.removeprefix("judgments: "): m.summary.get("judge") for m in stages}
    return {name: found["cost"] for name, found in facts.items() if found and found["cost"]}


_JUDGES = (
    "judge",
    "judgments",
    "missing",
    "same in both orders",
    "prefers the first",
    "prefers the longer",
    "its family wins (by others)",
    "cost",
)
_BETWEEN = ("between", "and", "pairs", "agree", "agree but for ties", "Cohen's kappa")
_BETWEEN_NOTE = (
    "A verdict on a pair is the mean over both orders. A tie agrees with a tie alone; "
    '"but for ties" leaves out the pairs that either calls a tie.'
)
_ALPHA = ("among", "pairs", "alpha, nominal", "alpha, ordinal")
_ALPHA_NOTE = "Krippendorff's alpha: 1 is perfect, 0 is chance."


def _table(
    title: str,
    header: tuple[str, ...],
    records: Sequence[Facts],
    cells: Callable[[Facts], tuple[str, ...]],
    by_category: bool,
) -> NamedTable:
    kept = [r for r in records if (r["category"] is not None) == by_category]
    rows = [cells(r) for r in kept[:MAX_ROWS]]
    if by_category:
        title, header = f"{title} by category", ("category", *header)
        categories = (r["category"] or "none" for r in kept)
        rows = [(c, *row) for c, row in zip(categories, rows, strict=False)]
    # Columns that are empty throughout, as costs where nothing costs, only take room.
    told = [n for n in range(len(header)) if any(row[n] for row in rows)]
    more = len(kept) - len(rows)
    return NamedTable(
        title,
        tuple(header[n] for n in told),
        tuple(tuple(row[n] for n in told) for row in rows),
        f"{more} more rows are in the manifest of the rankings." if more else "",
    )


def _rater(costs: Mapping[str, float], facts: Facts) -> tuple[str, ...]:
    unusable = f" and {facts['unusable']:,} unusable" if facts["unusable"] else ""
    cost = costs.get(facts["rater"]) if facts["category"] is None else None
    return (
        facts["rater"],
        f"{facts['judgments']:,}",
        percent(facts["missing"]) + unusable,
        percent(facts["consistency"]),
        percent(facts["first_rate"]),
        percent(facts["longer_wins"]),
        _family(facts),
        f"{cost:,.2f}" if cost else "",
    )


def _family(facts: Facts) -> str:
    if facts["family_wins"] is None:
        return ""
    others = percent(facts["family_wins_by_others"])
    return f"{facts['family']}: {percent(facts['family_wins'])} ({others})"


def _between(record: Facts) -> tuple[str, ...]:
    return (
        record["one"],
        record["other"],
        f"{record['pairs']:,}",
        _coefficient(record["agreement"], ".1%"),
        _coefficient(record["decided"], ".1%"),
        _coefficient(record["kappa"], ".3f"),
    )


def _reliability(record: Facts) -> tuple[str, ...]:
    coefficients = (_coefficient(record[level], ".3f") for level in ("nominal", "ordinal"))
    return (record["raters"], f"{record['pairs']:,}", *coefficients)


def _coefficient(coefficient: Facts, form: str) -> str:
    value = coefficient["value"]
    return str(coefficient["missing"]) if value is None else format(value, form)


def percent(share: float | None) -> str:
    """`12.3%`, or nothing where there is no share."""
    return "" if share is None else f"{share:.1%}"
