"""The whole life of one record, from its prompt to its pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from flows.running import planned
from preferences.errors import InputError
from preferences.records import (
    Candidate,
    Dropped,
    Judgment,
    Preference,
    Prompt,
    Ranking,
)

LONGEST = 300
"""Characters of a text that are shown."""


def trace_record(
    record_id: str, recipe: Path, settings: Mapping[str, str], store: str | None
) -> list[object]:
    """Everything that is known about the prompt a record belongs to, the record marked with ▶."""
    plan, place = planned(recipe, settings, store)
    artifacts = [a for name, a in plan.artifacts]
    kinds: dict[str, Any] = {
        "prompts": Prompt,
        "candidates": Candidate,
        "judgments": Judgment,
        "rankings": Ranking,
        "preferences": Preference,
    }

    def rows(stage: str) -> Iterator[Any]:
        for artifact in artifacts:
            if artifact.stage == stage:
                yield from place.read(artifact, kinds[stage])

    def drops() -> Iterator[Dropped]:
        for artifact in artifacts:
            yield from place.read(artifact, Dropped, kind="dropped")

    prompt_id = _prompt_of(record_id, [*map(rows, kinds), drops()])
    parts: list[object] = []
    for prompt in rows("prompts"):
        if prompt.prompt_id == prompt_id:
            parts.append(f"Prompt {prompt.prompt_id}, from {prompt.source}")
            parts += [f"  {m.role}: {_short(m.content)}" for m in prompt.messages]
    candidates = [c for c in rows("candidates") if c.prompt_id == prompt_id]
    rankings = [r for r in rows("rankings") if r.prompt_id == prompt_id]
    parts.append(_answers(candidates, rankings, record_id))
    letters = {c.candidate_id: _letter(n) for n, c in enumerate(candidates)}
    judgments = [j for j in rows("judgments") if j.prompt_id == prompt_id]
    if judgments:
        parts.append(_judgments(judgments, letters, record_id))
    for preference in rows("preferences"):
        if preference.prompt_id == prompt_id:
            parts.append(
                f"{_mark(preference.preference_id, record_id)}Pair {preference.preference_id}: "
                f"{letters[preference.chosen_id]} over {letters[preference.rejected_id]}, "
                f"probability {preference.probability:.3f}, margin {preference.margin:.2f}"
            )
    for drop in drops():
        if drop.prompt_id == prompt_id:
            mark = _mark(drop.record_id, record_id)
            detail = f" ({drop.detail})" if drop.detail else ""
            parts.append(f"{mark}Dropped in {drop.stage}: {drop.record_id}: {drop.reason}{detail}")
    return parts


def _prompt_of(record_id: str, sources: list[Iterator[Any]]) -> str:
    """The prompt of the record whose id begins so."""
    fields = ("candidate_id", "judgment_id", "preference_id", "record_id", "prompt_id")
    for source in sources:
        for row in source:
            if any(str(getattr(row, name, "")).startswith(record_id) for name in fields):
                return str(row.prompt_id)
    raise InputError(f"no record {record_id!r} in this recipe's artifacts; check the id")


def _answers(candidates: list[Candidate], rankings: list[Ranking], record_id: str) -> Table:
    means = {i: f"{m:+.2f}" for r in rankings for i, m in zip(r.candidate_ids, r.mean, strict=True)}
    table = Table(title="Answers", title_justify="left", show_lines=True)
    for column in ("", "id", "model", "status", "quality", "text"):
        table.add_column(column, overflow="fold")
    for number, candidate in enumerate(candidates):
        table.add_row(
            _mark(candidate.candidate_id, record_id) + _letter(number),
            candidate.candidate_id,
            candidate.model,
            candidate.status,
            means.get(candidate.candidate_id, ""),
            _plain(_short(candidate.response)),
        )
    return table


def _judgments(judgments: list[Judgment], letters: Mapping[str, str], record_id: str) -> Table:
    table = Table(title="Judgments, in the order shown", title_justify="left")
    for column in ("id", "judge", "shown", "said"):
        table.add_column(column, overflow="fold")
    for judgment in judgments:
        table.add_row(
            _mark(judgment.judgment_id, record_id) + judgment.judgment_id,
            judgment.judge,
            " ".join(letters.get(c, "?") for c in judgment.candidate_ids),
            _plain(_said(judgment)),
        )
    return table


def _said(judgment: Judgment) -> str:
    if judgment.failure is not None:
        return f"nothing: {judgment.failure}"
    if judgment.probability is not None:
        return f"P(first better) = {judgment.probability:.3f}"
    if judgment.verdict is not None:
        return judgment.verdict
    return "scores " + ", ".join(f"{s:.3f}" for s in judgment.scores or ())


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number)


def _mark(identity: str, record_id: str) -> str:
    return "▶ " if identity.startswith(record_id) else ""


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def _plain(text: str) -> Any:
    """Text that a terminal shows as it is: a model's answer may hold markup or control codes."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "·" for c in text))
