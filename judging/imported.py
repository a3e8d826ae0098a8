"""Judgments that were made elsewhere: verdicts of people or models, likes, preference tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import model_validator

from judging.judge import Group
from judging.verdicts import GRAMMARS
from preferences.config import Config
from preferences.conversations import (
    PairColumns,
    PromptColumns,
    pair_from_row,
    prompt_from_row,
)
from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Dropped, Judgment, JudgmentKind, Verdict
from preferences.tables import Row, column, read_rows, suggestion, text_column


class JudgmentColumns(PromptColumns):
    """Columns of a table of judgments. The prompt is found by its id, or else by its text."""

    first: str = "first"
    """The answer shown first: its id, or the name of its author."""
    second: str = "second"
    """The answer shown second."""
    response: str = "response"
    """For likes: the answer that was liked or not: its id, its author, or its text."""
    judge: str = "judge"
    """Who judged; without the column, the judge's name in the recipe stands for all."""
    probability: str = "probability"
    """P(the first is better)."""
    verdict: str = "verdict"
    """`first`, `second` or `tie`."""
    score_first: str = "score_first"
    """A score of the first answer that does not depend on the order; higher is better."""
    score_second: str = "score_second"
    """The same of the second."""
    reply: str = "reply"
    """The judge's words, to be read by a grammar."""
    label: str = "label"
    """For likes: true or false."""


class ImportedJudgments(Config):
    """Judgments from a table."""

    kind: Literal["import"]
    name: str
    """What reports call this judge."""
    source: str
    """A .jsonl, .json, .csv or .parquet file (or .gz), a `datasets` folder, or a Hub id."""
    split: str = "train"
    """Which split, where the source has several."""
    people: bool = False
    """Whether people judged. What they say calibrates the judges, and the column `judge` tells the
    annotators apart."""
    format: Literal["judgments", "preferences", "transcripts", "feedback"] = "judgments"
    """`judgments`: a row a comparison; `preferences` and `transcripts`: the chosen answer is better
    than the rejected; `feedback`: a row an answer that was liked or not."""
    verdict_in: Literal["probability", "verdict", "scores", "reply"] = "verdict"
    """Where `judgments` hold what the judge said."""
    grammar: Literal["letter", "final", "arena_hard"] = "letter"
    """How a `reply` is read."""
    probability_range: tuple[float, float] = (0.0, 1.0)
    """The values of the column that mean P = 0 and P = 1; (2, 1) where 1 is for the first answer
    and 2 for the second."""
    columns: JudgmentColumns = JudgmentColumns()
    """Columns of `judgments` and `feedback`."""
    pair_columns: PairColumns = PairColumns()
    """Columns of `preferences` and `transcripts`."""

    @model_validator(mode="after")
    def _range_has_width(self) -> ImportedJudgments:
        if self.probability_range[0] == self.probability_range[1]:
            raise ValueError("`probability_range` needs two different values")
        return self


def import_judgments(
    config: ImportedJudgments, rows: Iterable[tuple[str, Row]], groups: Iterable[Group]
) -> Iterator[Judgment | Dropped]:
    """The table's judgments on these groups; what names an unknown prompt or answer is dropped.

    Raises InputError at the first malformed row.
    """
    lookup = _Lookup(groups)
    read = _READERS.get(config.format, _read_judgment)
    seen: set[str] = set()
    for place, row in rows:
        record = read(config, lookup, place, row)
        if record is None:
            name = f"{config.name}@{place}"
            record = Dropped("judgments", name, "", "unknown_prompt", place)
        elif isinstance(record, Judgment):
            if record.judgment_id in seen:
                name = f"{record.judgment_id}@{place}"
                record = Dropped("judgments", name, record.prompt_id, "duplicate", place)
            else:
                seen.add(record.judgment_id)
        yield record


def prompt_of_row(
    config: ImportedJudgments, place: str, row: Row, source_ids: Mapping[str, str]
) -> str | None:
    """The id of the prompt a row is about; `source_ids` maps all ids it may use to ours."""
    if config.format in ("preferences", "transcripts"):
        transcripts = config.format == "transcripts"
        return pair_from_row(row, config.pair_columns, place, transcripts)[0].prompt_id
    name = config.columns.prompt_id
    if row.get(name) is not None:
        return source_ids.get(str(row[name]))
    return prompt_from_row(row, config.columns, place).prompt_id


def check_judgments(config: ImportedJudgments) -> None:
    """Read the whole table without keeping anything; raises InputError at a malformed row."""
    nothing = _Lookup(())
    read = _READERS.get(config.format, _read_judgment)
    for place, row in read_rows(config.source, config.split):
        read(config, nothing, place, row)


class _Lookup:
    """Finds the candidates that rows refer to."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self._groups: dict[str, Group] = {}
        self._source_ids: dict[str, str] = {}
        self._references: dict[str, Mapping[str, list[Candidate]]] = {}
        for group in groups:
            self._groups[group.prompt.prompt_id] = group
            self._source_ids[group.prompt.prompt_id] = group.prompt.prompt_id
            if group.prompt.source_id is not None:
                self._source_ids[group.prompt.source_id] = group.prompt.prompt_id

    def group(self, config: ImportedJudgments, place: str, row: Row) -> Group | None:
        """The group a row is about, by the prompt's id in the table or by the prompt itself."""
        return self._groups.get(prompt_of_row(config, place, row, self._source_ids) or "")

    def candidates(self, group: Group, reference: str) -> list[Candidate]:
        """The candidates a reference can mean: by id, by author, or by text."""
        prompt_id = group.prompt.prompt_id
        if prompt_id not in self._references:
            found: dict[str, list[Candidate]] = defaultdict(list)
            for candidate in group.candidates:
                names = (candidate.source_id, candidate.model, candidate.response)
                for key in {candidate.candidate_id, *names}:
                    if key is not None:
                        found[key].append(candidate)
            self._references[prompt_id] = found
        return self._references[prompt_id].get(reference, [])


def _read_judgment(
    config: ImportedJudgments, lookup: _Lookup, place: str, row: Row
) -> Judgment | Dropped | None:
    columns = config.columns
    references = [text_column(row, name, place) for name in (columns.first, columns.second)]
    said = _SAID[config.verdict_in](config, place, row)
    group = lookup.group(config, place, row)
    if group is None:
        return None
    judge = str(row.get(columns.judge) or config.name)
    shown: list[Candidate] = []
    for reference in references:
        found = lookup.candidates(group, reference)
        if len(found) != 1:
            reason = "ambiguous_candidate" if found else "unknown_candidate"
            detail = f"{place}: {reference[:60]!r}"
            return _dropped(group, judge, place, reason, detail)
        shown.append(found[0])
    if shown[0].candidate_id == shown[1].candidate_id:
        return _dropped(group, judge, place, "compares_an_answer_with_itself", place)
    return _judgment("imported", config, judge, group, shown, said)


def _read_pair(
    config: ImportedJudgments, lookup: _Lookup, place: str, row: Row
) -> Judgment | Dropped | None:
    transcripts = config.format == "transcripts"
    _, chosen, rejected = pair_from_row(row, config.pair_columns, place, transcripts)
    group = lookup.group(config, place, row)
    if group is None:
        return None
    if chosen.response == rejected.response:
        return _dropped(group, config.name, place, "identical_answers", place)
    # Scores, not a verdict: the table does not say which answer was shown first.
    said = {"scores": (1.0, 0.0)}
    return _judgment("imported", config, config.name, group, [chosen, rejected], said)


def _read_feedback(
    config: ImportedJudgments, lookup: _Lookup, place: str, row: Row
) -> Judgment | Dropped | None:
    columns = config.columns
    liked = _truth(column(row, columns.label, place), columns.label, place)
    reference = text_column(row, columns.response, place)
    group = lookup.group(config, place, row)
    if group is None:
        return None
    judge = str(row.get(columns.judge) or config.name)
    found = lookup.candidates(group, reference)
    if len(found) != 1:
        reason = "ambiguous_candidate" if found else "unknown_candidate"
        return _dropped(group, judge, place, reason, f"{place}: {reference[:60]!r}")
    return _judgment("feedback", config, judge, group, found, {"scores": (float(liked),)})


_READERS: dict[str, Callable[[ImportedJudgments, _Lookup, str, Row], Judgment | Dropped | None]] = {
    "preferences": _read_pair,
    "transcripts": _read_pair,
    "feedback": _read_feedback,
}


def _judgment(
    kind: JudgmentKind,
    config: ImportedJudgments,
    judge: str,
    group: Group,
    shown: list[Candidate],
    said: dict[str, Any],
) -> Judgment:
    ids = tuple(candidate.candidate_id for candidate in shown)
    # What was said is not in the identity: a judge who says two things of one pair is a duplicate.
    identity = fingerprint([kind, judge, ids])
    prompt_id = group.prompt.prompt_id
    if config.people:
        annotator = judge if judge != config.name else None
        said = {**said, "annotator": annotator}
        kind, judge = "human", config.name
    return Judgment(identity, prompt_id, kind, judge, ids, **said)


def _dropped(group: Group, judge: str, place: str, reason: str, detail: str) -> Dropped:
    return Dropped("judgments", f"{judge}@{place}", group.prompt.prompt_id, reason, detail)


# What a judge said, as fields of the judgment.


def _said_probability(config: ImportedJudgments, place: str, row: Row) -> dict[str, Any]:
    low, high = config.probability_range
    value = _number(row, config.columns.probability, place)
    probability = (value - low) / (high - low)
    if not 0 <= probability <= 1:
        raise InputError(
            f"{place}: column {config.columns.probability!r} holds {value}, outside "
            f"{min(low, high):g} to {max(low, high):g}; set `probability_range` or mend the row"
        )
    return {"probability": probability}


def _said_verdict(config: ImportedJudgments, place: str, row: Row) -> dict[str, Any]:
    verdict = text_column(row, config.columns.verdict, place)
    known: dict[str, Verdict] = {"first": "first", "second": "second", "tie": "tie"}
    if verdict not in known:
        raise InputError(f"{place}: no verdict {verdict!r}; {suggestion(verdict, known)}")
    return {"verdict": known[verdict]}


def _said_scores(config: ImportedJudgments, place: str, row: Row) -> dict[str, Any]:
    names = (config.columns.score_first, config.columns.score_second)
    return {"scores": tuple(_number(row, name, place) for name in names)}


def _said_reply(config: ImportedJudgments, place: str, row: Row) -> dict[str, Any]:
    reply = text_column(row, config.columns.reply, place)
    verdict = GRAMMARS[config.grammar](reply)
    failure = None if verdict is not None else "no verdict in reply"
    return {"verdict": verdict, "reply": reply, "failure": failure}


_SAID = {
    "probability": _said_probability,
    "verdict": _said_verdict,
    "scores": _said_scores,
    "reply": _said_reply,
}


def _number(row: Row, name: str, place: str) -> float:
    value = column(row, name, place)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise InputError(f"{place}: column {name!r} holds {str(value)[:40]!r}, not a finite number")
    return number


def _truth(value: Any, name: str, place: str) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "1", "1.0"):
        return True
    if text in ("false", "0", "0.0"):
        return False
    raise InputError(f"{place}: column {name!r} holds {str(value)[:40]!r}, not true or false")
