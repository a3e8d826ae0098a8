"""What came out of a recipe, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.comparison import interval
from flows.labels import asked_before
from flows.people import routing_table, waiting_line
from flows.plan import Plan
from flows.progress import Advance
from flows.running import planned
from flows.steps import ALIGNMENT
from preferences.judge_tables import NamedTable, judge_costs, judge_tables
from preferences.reliability import reliability_table, reliability_words
from preferences.store import Artifact, Store


def status_table(recipe: Path, settings: Mapping[str, str], store: str | None) -> Table:
    """Each stage: done, begun or owed."""
    plan, place = planned(recipe, settings, store)
    table = _table(
        f"{plan.recipe.name} in {place.url}", "stage", "state", "rows", "dropped", "artifact"
    )
    for name, artifact in plan.artifacts:
        manifest = place.manifest(artifact)
        if manifest is not None:
            cells = ("done", f"{manifest.rows:,}", f"{manifest.dropped:,}")
        elif place.fs.exists(place.folder(artifact)):
            cells = ("begun", "", "")
        else:
            cells = ("owed", "", "")
        table.add_row(name, *cells, str(artifact))
    return table


def report_tables(
    recipe: Path,
    settings: Mapping[str, str],
    store: str | None,
    dataset_only: bool = False,
    timings: Mapping[str, Advance] | None = None,
) -> list[object]:
    """The dataset, its judges, the training and the comparison, as far as they are there."""
    plan, place = planned(recipe, settings, store, dataset_only)
    parts: list[object] = []
    if timings:
        parts.append(_timings(timings))
    parts += [*_dataset(plan, place), *_judges(plan, place), *_people(plan, place)]
    parts += [*_trainings(plan, place), *_evaluation(plan, place)]
    return parts or [f"{plan.recipe.name}: nothing is finished in {place.url} yet"]


def _timings(timings: Mapping[str, Advance]) -> Table:
    table = _table("Calls", "stage", "calls", "of them new", "seconds", "per second")
    for name, advance in timings.items():
        new = advance.done - advance.recorded
        cells = (f"{advance.done:,}", f"{new:,}", f"{advance.seconds:.1f}", f"{advance.rate:,.0f}")
        table.add_row(name, *cells)
    return table


def _dataset(plan: Plan, place: Store) -> list[object]:
    manifest = place.manifest(plan.dataset)
    if manifest is None:
        return []
    table = _table(
        f"Dataset {manifest.name} ({manifest.fingerprint})",
        "split",
        "pairs",
        "prompts",
        "mean probability",
        "chosen longer",
    )
    for split, facts in manifest.summary.items():
        table.add_row(
            split,
            f"{facts['rows']:,}",
            f"{facts['prompts']:,}",
            f"{facts['mean_probability']:.3f}",
            f"{facts['chosen_longer']:.1%}",
        )
    return [table, f"Card: {place.folder(plan.dataset)}/README.md", *_drops(plan, place)]


def _drops(plan: Plan, place: Store) -> list[object]:
    table = _table("Dropped", "stage", "reason", "rows")
    for name, artifact in plan.artifacts:
        manifest = place.manifest(artifact)
        for reason, count in (manifest.summary.get("dropped", {}) if manifest else {}).items():
            table.add_row(name, reason.replace("_", " "), f"{count:,}")
    return [table] if table.row_count else []


def _judges(plan: Plan, place: Store) -> list[object]:
    rankings = place.manifest(plan.rankings)
    if rankings is None or "agreement" not in rankings.summary:
        return []
    judged = [m for a in plan.judgments if (m := place.manifest(a)) is not None]
    parts: list[object] = []
    tables = judge_tables(rankings.summary["agreement"], judge_costs(judged))
    if (probabilities := reliability_table(rankings.summary)) is not None:
        tables.append(probabilities)
    parts += map(shown, tables)
    parts += [Text(f"! {alarm}") for m in judged for alarm in m.summary.get("alarms", ())]
    return [*parts, Text(reliability_words(rankings.summary))]


def shown(found: NamedTable) -> Table:
    """A table for the terminal."""
    table = _table(found.title, *found.header)
    table.caption, table.caption_justify = found.note or None, "left"
    for row in found.rows:
        table.add_row(*map(escape, row))  # Names of people and categories are any text.
    return table


def _people(plan: Plan, place: Store) -> list[object]:
    manifest = place.manifest(plan.routes) if plan.routes else None
    if manifest is None or plan.recipe.people is None:
        return []
    table = shown(routing_table(manifest.summary))
    table.show_header = False
    asked = asked_before(plan.recipe, place)
    if asked is None:
        return [table]
    return [table, Text(waiting_line(asked, asked.missing(plan.given), plan.recipe.people))]


def _trainings(plan: Plan, place: Store) -> list[object]:
    trained = [*zip(plan.recipe.steps, plan.steps, strict=True)]
    trained += [(ALIGNMENT, plan.alignment)] if plan.alignment else []
    return [part for name, artifact in trained for part in _training(name, artifact, place)]


def _training(name: str, artifact: Artifact, place: Store) -> list[object]:
    manifest = place.manifest(artifact)
    if manifest is None:
        return []
    summary = manifest.summary
    title = "Training" if name == ALIGNMENT else f"Training {name}, by {summary['method']}"
    table = _table(title, "what", "value")
    table.add_row("weights", f"{summary['weights']}, {summary['trainable_parameters']:,} trained")
    table.add_row("steps", f"{summary['steps']} of {summary['planned_steps']}")
    if summary["reason"]:
        table.add_row("note", summary["reason"])
    held_out = summary["held_out"]
    if "accuracy" in held_out:
        table.add_row("held-out pairs", f"{held_out['pairs']:,}")
        table.add_row("held-out reward accuracy", interval(held_out["accuracy"]))
        table.add_row('"the longer answer wins"', interval(held_out["longer_wins"]))
    for texts in ("new", "old"):
        if (loss := held_out.get(texts)) is not None:
            words = f"{loss['before']:.3f} before, {loss['after']:.3f} after"
            table.add_row(f"held-out loss, {texts} texts", words)
    return [table, f"Model: {place.folder(artifact)}/{summary['saved']}"]


def _evaluation(plan: Plan, place: Store) -> list[object]:
    manifest = place.manifest(plan.evaluation) if plan.evaluation else None
    if manifest is None:
        return []
    from flows.comparison import evaluation_rows

    table = _table(
        f"Before and after, {manifest.summary['prompts']} prompts", "", "before", "after"
    )
    for row in evaluation_rows(manifest.summary):
        table.add_row(*row)
    return [table]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table
