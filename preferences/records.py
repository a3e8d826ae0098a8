"""The records all stages share: frozen, flat, each with an id and, in Parquet, a schema.

A record never changes; what is learnt about it later is another record that names it.
Ids come from content: a prompt's from its messages, a candidate's and a judgment's from the
request that asked for it, so that an interrupted run knows what is still owed.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preferences.fingerprint import fingerprint

SCHEMA_VERSION = 2
"""Raised when a field changes meaning; stored in every Parquet file's metadata."""

Verdict = Literal["first", "second", "tie"]
Status = Literal["complete", "truncated", "empty", "failed"]
Decision = Literal["keep", "calibrate", "ask", "over_budget"]
"""`keep`: the judges are sure enough; `calibrate`: in the random slice that people are asked about;
`ask`: people are asked because it is worth it; `over_budget`: unsure, but others were worth more.
"""
JudgmentKind = Literal[
    "pairwise",
    "pairwise_reasoned",
    "pointwise",
    "listwise",
    "reward_model",
    "verifier",
    "human",
    "imported",
    "feedback",
    "prior",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str


Messages = tuple[Message, ...]


def messages_from(value: str | Sequence[Mapping[str, str] | Message]) -> Messages:
    """A conversation from a single string (one user turn) or from role/content mappings."""
    if isinstance(value, str):
        return (Message("user", value),)
    return tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in value)


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that awaits an assistant's answer."""

    prompt_id: str
    """`fingerprint` of the messages: equal conversations are one prompt."""
    messages: Messages
    source: str
    """The file it came from and the row there, as `prompts.jsonl:17`."""
    source_id: str | None = None
    """The id the source gave it; imported responses and judgments refer to it."""
    category: str | None = None
    reference: str | None = None
    """The known right answer, for verifiers."""


def prompt_identity(messages: Messages) -> str:
    """The id of the prompt with these messages."""
    return fingerprint([[m.role, m.content] for m in messages])


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to a prompt, by a model or a person."""

    candidate_id: str
    """Identity of the request: prompt, model and revision, sampling, seed and index."""
    prompt_id: str
    model: str
    """Who answered: the recipe's name for the model, or the name in the imported table."""
    response: str
    status: Status
    """`truncated`: cut by the token limit; `empty`: only white space; `failed`: no reply."""
    index: int = 0
    """Which of the model's answers to this prompt, from 0."""
    source_id: str | None = None
    """The id an imported table gave it; imported judgments refer to it."""
    seed: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprob: float | None = None
    """Sum of the sampled tokens' log-probabilities, in nats."""
    cost: float | None = None
    """In the currency of the recipe's prices."""
    failure: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Judgment:
    """What one judge said of one or more candidates, in the order shown, or why it said nothing.

    A verdict that could not be read has `failure` set and neither probability, verdict nor scores:
    a missing verdict is not a number.
    """

    judgment_id: str
    prompt_id: str
    kind: JudgmentKind
    judge: str
    candidate_ids: tuple[str, ...]
    """As shown: for a comparison the first is the one the judge read first."""
    probability: float | None = None
    """P(the first shown is better than the second), in [0, 1]; 0.5 is a tie."""
    verdict: Verdict | None = None
    """The outright verdict, where the judge gave words and not probabilities."""
    scores: tuple[float, ...] | None = None
    """One per candidate, higher is better, independent of the order shown."""
    verdict_mass: float | None = None
    """Share of probability the judge put on any verdict token; low means it wanted to say else."""
    failure: str | None = None
    reply: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    annotator: str | None = None
    answered_at: str | None = None
    """When a person answered, in UTC, as 2026-01-31T18:00:00Z."""
    suggested: bool | None = None
    """Whether that person saw a suggested answer beforehand."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """Posterior over the quality of the candidates of one prompt."""

    prompt_id: str
    candidate_ids: tuple[str, ...]
    mean: tuple[float, ...]
    """Quality in logits: σ(difference) is the probability of winning."""
    covariance: tuple[float, ...]
    """K × K, row by row."""
    judgment_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """One candidate preferred to another, with how sure we are."""

    preference_id: str
    prompt_id: str
    chosen_id: str
    rejected_id: str
    probability: float
    """P(chosen beats rejected), between 0.5 and 1."""
    margin: float
    """Difference of the posterior means, in logits."""
    judgment_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Triplet:
    """What trainers eat: a prompt, the answer to prefer and the answer to prefer it to."""

    preference_id: str
    prompt_id: str
    prompt: Messages
    chosen: Messages
    """The answer to prefer, as one assistant message: the form TRL's trainers take as it is."""
    rejected: Messages
    chosen_id: str
    rejected_id: str
    chosen_model: str
    rejected_model: str
    probability: float
    margin: float


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """A record that went no further, and why."""

    stage: str
    record_id: str
    prompt_id: str
    reason: str
    """A word that can be counted, as `near_duplicate` or `probability_below_minimum`."""
    detail: str = ""
    """What it matched, the value that was too small, the line it stood on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Whether people are asked about a prompt, and the numbers by which that was decided."""

    prompt_id: str
    decision: Decision
    first_id: str
    """Of the pair that people are asked about, or that is kept: the one more likely better."""
    second_id: str
    probability: float
    """P(the first beats the second) by the judges alone, between 0.5 and 1."""
    confidence: float
    """P(the candidate with the highest mean beats the one with the lowest): how sure judges are."""
    regret: float
    """By how much, in logits, the best is expected to beat the one that the judges prefer."""
    weight: float
    """Of the prompt's category: regret times weight is what an answer is worth."""
    threshold: float | None
    """The confidence that is enough; None where none was found to be."""
    others: tuple[str, ...] = ()
    """Candidates that people rank together with the two, where a question shows more."""


Record = Prompt | Candidate | Judgment | Ranking | Preference | Triplet | Dropped | Route
RecordT = TypeVar(
    "RecordT", Prompt, Candidate, Judgment, Ranking, Preference, Triplet, Dropped, Route
)


def schema_of(record: type[Record]) -> pa.Schema:
    """The Parquet schema of a record type, with the schema version in its metadata."""
    hints = get_type_hints(record)
    fields = [_field(f.name, hints[f.name]) for f in dataclasses.fields(record)]
    metadata = {"record": record.__name__, "schema_version": str(SCHEMA_VERSION)}
    return pa.schema(fields, metadata=metadata)


def to_table(record: type[RecordT], rows: Iterable[RecordT]) -> pa.Table:
    """Rows as an Arrow table of the record's schema."""
    schema = schema_of(record)
    rows = list(rows)
    columns = [_column([getattr(row, field.name) for row in rows], field.type) for field in schema]
    return pa.table(columns, schema=schema)


def from_table(record: type[RecordT], table: pa.Table) -> list[RecordT]:
    """The rows of an Arrow table as records; raises ValueError on another schema version."""
    version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise ValueError(
            f"{record.__name__}: schema version {version}, not {SCHEMA_VERSION}; make it anew"
        )
    columns = [_values(table.column(field.name), field.type) for field in schema_of(record)]
    return [record(*cells) for cells in zip(*columns, strict=True)]


def _field(name: str, hint: Any) -> pa.Field:
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(arg for arg in get_args(hint) if arg is not type(None))
        return pa.field(name, _arrow(inner), nullable=True)
    return pa.field(name, _arrow(hint), nullable=False)


def _arrow(hint: Any) -> pa.DataType:
    if get_origin(hint) is typing.Literal:
        return pa.string()
    if get_origin(hint) is tuple:
        return pa.list_(_arrow(get_args(hint)[0]))
    if hint is Message:
        return pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[hint]


# Columns are converted whole: a value at a time, this takes most of the time of a big dataset.


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind == _MESSAGES:
        ends = itertools.accumulate((len(messages) for messages in values), initial=0)
        turns = [message for messages in values for message in messages]
        parts = [_text([m.role for m in turns]), _text([m.content for m in turns])]
        messages = pa.StructArray.from_arrays(parts, fields=list(kind.value_type))
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), messages, type=kind)
    return _text(values) if kind == pa.string() else pa.array(values, kind)


def _text(values: list[str | None]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        # Arrow holds UTF-8, which has no lone surrogates; a model can emit one.
        whole = [v and v.encode("utf-8", "replace").decode() for v in values]
        return pa.array(whole, pa.string())


def _values(column: pa.ChunkedArray, kind: pa.DataType) -> list[Any]:
    if not pa.types.is_list(kind):
        if pa.types.is_string(kind) or not column.null_count:
            return list(column.to_numpy().tolist())
        return list(column.to_pylist())
    flat = pc.list_flatten(column)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if kind == _MESSAGES:
        parts = [pc.struct_field(flat, name).to_numpy().tolist() for name in ("role", "content")]
        items = list(map(Message, *parts))
    else:
        items = flat.to_numpy().tolist()
    ends = np.cumsum(lengths)
    cuts = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
    values: list[Any] = [tuple(items[start:end]) for start, end in cuts]
    if column.null_count:
        valid = column.is_valid().to_pylist()
        return [v if there else None for v, there in zip(values, valid, strict=True)]
    return values


_MESSAGES = _arrow(Messages)
