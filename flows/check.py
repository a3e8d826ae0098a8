"""Reading every input once before any work starts, so that a mistake costs nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flows.labels import gold_questions
from flows.recipe import Recipe
from generation.candidates import ImportedCandidates, imported_prompts, parse_import
from generation.prompts import load_prompts
from judging.imported import ImportedJudgments, check_judgments
from judging.prior import Prior
from judging.verifier import Verifier, load_check
from preferences.errors import InputError
from preferences.records import Prompt
from preferences.splits import require_both_sides
from preferences.tables import read_rows, suggestion


def check_inputs(recipe: Recipe) -> None:
    """Raise InputError at the first row, column or name that would stop the recipe later."""
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
    if recipe.people is not None:
        gold_questions(recipe.people)
    if recipe.evaluation is not None:
        for check in recipe.evaluation.checks.values():
            load_check(check)


def _authors(imports: Iterable[ImportedCandidates]) -> set[str]:
    """Everybody who answers in the imported tables; reads each table to its end."""
    return {
        candidate.model
        for config in imports
        for place, row in read_rows(config.source, config.split)
        for candidate in parse_import(config, place, row)[1]
    }
