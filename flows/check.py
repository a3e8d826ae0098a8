"""Reading every input once before any work starts, so that a mistake costs nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flows.labels import gold_questions
from flows.recipe import Recipe
from generation.candidates import ImportedCandidates, imported_prompts, parse_import
from generation.engine import EngineConfig
from generation.prompts import load_prompts
from judging.imported import ImportedJudgments, check_judgments
from judging.prior import Prior
from judging.verifier import Verifier, load_check
from preferences.errors import InputError
from preferences.records import Prompt
from preferences.splits import require_both_sides
from preferences.tables import read_rows, suggestion, text_column
from training.merge import check_served
from training.pretraining import PretrainingConfig, TextsConfig


def check_inputs(recipe: Recipe) -> None:
    """Raise InputError at the first row, column or name that would stop the recipe later."""
    for part in (*recipe.candidates, *recipe.judges):
        if isinstance(part, EngineConfig) and part.engine != "openai" and part.adapter is not None:
            check_served(Path(part.adapter), part.engine)
    imports = [c for c in recipe.candidates if isinstance(c, ImportedCandidates)]
    authors = _authors(imports)
    prompts: Iterable[Any] = (
        load_prompts(recipe.prompts) if recipe.prompts else imported_prompts(imports)
    )
    kept = {p.prompt_id for p in prompts if isinstance(p, Prompt)}
    if not kept:
        raise InputError(f"{recipe.name}: no prompt is left; see `prompts` in the recipe")
    require_both_sides(kept, recipe.split, recipe.name)
    authors |= {c.name for c in recipe.candidates if not isinstance(c, ImportedCandidates)}
    for judge in recipe.judges:
        if isinstance(judge, ImportedJudgments):
            check_judgments(judge)
        elif isinstance(judge, Verifier):
            load_check(judge.check, judge.pattern)
        elif isinstance(judge, Prior):
            for name in judge.order:
                if name not in authors:
                    raise InputError(
                        f"judges.{judge.name}.order: nobody named {name!r} answers; "
                        f"{suggestion(name, sorted(authors))}"
                    )
    for name, training in recipe.trainings.items():
        if isinstance(training, PretrainingConfig) and training.texts is not None:
            _check_texts(f"{name}.texts", training.texts)
    if recipe.people is not None:
        gold_questions(recipe.people)
    if recipe.evaluation is not None:
        for check in recipe.evaluation.checks.values():
            load_check(check)


def _check_texts(place: str, texts: TextsConfig) -> None:
    """Every row of every table has a text in the column, and some have more than spaces."""
    for name, tables in (("new", texts.new), ("old", texts.old)):
        rows = (row for table in tables for row in read_rows(table))
        some = sum(bool(text_column(row, texts.column, at).strip()) for at, row in rows)
        if tables and not some:
            raise InputError(f"{place}.{name}: no text in {', '.join(tables)}; add some")


def _authors(imports: Iterable[ImportedCandidates]) -> set[str]:
    """Everybody who answers in the imported tables; reads each table to its end."""
    return {
        candidate.model
        for config in imports
        for place, row in read_rows(config.source, config.split)
        for candidate in parse_import(config, place, row)[1]
    }
