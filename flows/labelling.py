"""What the `pairwright label` commands do: push, status, pull, export, import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from flows import labels, stages
from flows.people import waiting_line
from flows.progress import Progress
from flows.report import shown
from flows.run import Run
from flows.running import loaded, planned
from judging.argilla.annotators import Crowd, crowd, tables, warnings
from judging.gold import read_gold
from judging.people import TableOfLabels
from preferences.errors import InputError
from preferences.store import Artifact


def push(recipe: Path, settings: Mapping[str, str], store: str | None) -> None:
    """Decide anew what people are worth asking, and put it to them."""
    labels.take_up(*loaded(recipe, settings, store, dataset_only=True), Progress().say)
    run, _ = _routed(recipe, settings, store)
    stages.ask_people(run)


def pull(recipe: Path, settings: Mapping[str, str], store: str | None) -> int:
    """Take people's answers into the store; returns how many are new or changed."""
    return labels.pull(*loaded(recipe, settings, store, dataset_only=True))


def export(recipe: Path, settings: Mapping[str, str], store: str | None, table: Path) -> int:
    """Write the questions into a table for people to fill in; returns how many there are."""
    run, routed = _routed(recipe, settings, store)
    assert run.plan.recipe.people is not None
    questions = stages.open_questions(run, routed)
    TableOfLabels(table).ask([*questions, *labels.gold_questions(run.plan.recipe.people)])
    return len(questions)


def take_in(recipe: Path, settings: Mapping[str, str], store: str | None, table: Path) -> int:
    """Take a table's answers into the store; returns how many are new or changed."""
    return labels.import_table(*loaded(recipe, settings, store, dataset_only=True), table)


def status(
    recipe: Path, settings: Mapping[str, str], store: str | None
) -> tuple[str, Crowd | None]:
    """How many answers are in, in words, and how the annotators do, where Argilla knows it."""
    checked, place = loaded(recipe, settings, store, dataset_only=True)
    asked = labels.asked_before(checked, place)
    if checked.people is None or asked is None:
        raise InputError(f"{recipe}: nobody was asked yet; `pairwright build` asks")
    if checked.people.labels != labels.ARGILLA:
        missing = asked.missing(labels.answers_so_far(checked, place))
        return waiting_line(asked, missing, checked.people), None
    said = labels.argilla_people(checked, place).labels()
    missing = asked.missing(a.judgment for a in said.answers if a.about.purpose != "gold")
    gold = [] if checked.people.gold is None else read_gold(checked.people.gold)
    return waiting_line(asked, missing, checked.people), crowd(said.answers, gold)


def status_parts(found: tuple[str, Crowd | None]) -> list[object]:
    """The same for a terminal."""
    line, people = found
    parts: list[object] = [line]
    if people is not None:
        parts += [*map(shown, tables(people)), *(f"! {text}" for text in warnings(people))]
    return parts


def status_json(found: tuple[str, Crowd | None]) -> str:
    """The same for a program."""
    line, people = found
    told = [] if people is None else list(warnings(people))
    facts = None if people is None else asdict(people)
    return json.dumps({"people": line, "crowd": facts, "warnings": told}, indent=1, default=str)


def _routed(recipe: Path, settings: Mapping[str, str], store: str | None) -> tuple[Run, Artifact]:
    """The run with its routes made, which takes judgments and no model."""
    plan, place = planned(recipe, settings, store, dataset_only=True)
    if plan.routes is None:
        raise InputError(f"{recipe}: asks nobody; add `people`")
    before = [plan.prompts, *plan.candidates, *plan.judgments]
    owed = [str(a) for a in before if place.manifest(a) is None]
    if owed:
        raise InputError(
            f"{recipe}: {owed[0]} is not made yet, so nobody knows what is worth asking; "
            "`pairwright build` first"
        )
    run = Run(plan, place, Progress())
    stages.make_prompts(run)
    stages.make_answers(run)
    stages.make_routes(run)
    return run, plan.routes
