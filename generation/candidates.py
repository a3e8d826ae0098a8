"""Prompts in, candidate answers out: sampled from a model, or imported from a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from pydantic import Field

from generation.engine import Completion, Engine, EngineConfig, Request, Sampling
from preferences.config import Config
from preferences.conversations import (
    PairColumns,
    PromptColumns,
    imported_candidate,
    pair_from_row,
    prompt_from_row,
)
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Dropped, Prompt, Status
from preferences.tables import Row, read_rows, text_column


class SampledCandidates(EngineConfig):
    """Answers sampled from a model."""

    kind: Literal["sample"]
    name: str
    """What the records call this model; one name, one model."""
    samples: int = Field(4, ge=1, le=1024)
    """Answers to each prompt."""
    sampling: Sampling = Sampling()
    """How they are drawn."""
    seed: int = 0
    """Another seed, other answers."""


class ResponseColumns(PromptColumns):
    """Columns of a table of answers."""

    response: str = "response"
    """The answer."""
    model: str = "model"
    """Who answered: a model's name, or a person's."""
    response_id: str = "response_id"
    """The table's own id for the answer, by which imported judgments may refer to it."""


class ImportedCandidates(Config):
    """Answers that people or other models gave before."""

    kind: Literal["import"]
    name: str
    """What reports call this table."""
    source: str
    """A .jsonl, .json, .csv or .parquet file (or .gz), a `datasets` folder, or a Hub id."""
    split: str = "train"
    """Which split, where the source has several."""
    format: Literal["responses", "preferences", "transcripts"] = "responses"
    """`responses`: a row an answer; `preferences`: a row a prompt with a chosen and a rejected
    answer; `transcripts`: two HH-RLHF dialogues that differ in their last turn."""
    columns: ResponseColumns = ResponseColumns()
    """Columns of `responses`."""
    pair_columns: PairColumns = PairColumns()
    """Columns of `preferences` and `transcripts`."""


CandidateSource = SampledCandidates | ImportedCandidates


def requests(
    prompts: Iterable[Prompt], config: SampledCandidates, model_identity: str
) -> Iterator[Request]:
    """One request for each answer that is wanted; its id is the candidate's.

    Each has a seed of its own, from its id: answers are reproducible one by one, and no two
    requests share their noise.
    """
    for prompt in prompts:
        for index in range(config.samples):
            identity = fingerprint(
                [prompt.prompt_id, model_identity, config.sampling, config.seed, index]
            )
            yield Request(
                identity, prompt.messages, config.sampling, seed=int(identity, 16) % 2**31
            )


def sample(
    prompts: Sequence[Prompt], config: SampledCandidates, model_identity: str, engine: Engine
) -> list[Candidate]:
    """Every wanted answer to the prompts, in the order of the requests.

    Truncated, empty and failed answers are here too, marked by their status.
    """
    asked = list(requests(prompts, config, model_identity))
    completions = {c.request_id: c for c in engine.complete(asked)}
    owners = (prompt.prompt_id for prompt in prompts for _ in range(config.samples))
    return [
        _candidate(request, prompt_id, number % config.samples, config.name, completions)
        for number, (request, prompt_id) in enumerate(zip(asked, owners, strict=True))
    ]


def _candidate(
    request: Request,
    prompt_id: str,
    index: int,
    model: str,
    completions: Mapping[str, Completion],
) -> Candidate:
    completion = completions[request.request_id]
    return Candidate(
        candidate_id=request.request_id,
        prompt_id=prompt_id,
        model=model,
        response=completion.text,
        status=_status(completion),
        index=index,
        seed=request.seed,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        logprob=completion.logprob,
        cost=completion.cost,
        failure=completion.failure,
    )


def _status(completion: Completion) -> Status:
    if completion.finish_reason == "failed":
        return "failed"
    if not completion.text.strip():
        return "empty"
    return "truncated" if completion.finish_reason == "length" else "complete"


def parse_import(
    config: ImportedCandidates, place: str, row: Row
) -> tuple[Prompt, tuple[Candidate, ...]]:
    """A row of the table as its prompt and the one or two answers it holds.

    Raises InputError if it is malformed.
    """
    if config.format != "responses":
        transcripts = config.format == "transcripts"
        prompt, *pair = pair_from_row(row, config.pair_columns, place, transcripts)
        return prompt, tuple(pair)
    columns = config.columns
    prompt = prompt_from_row(row, columns, place)
    response_id = row.get(columns.response_id)
    candidate = imported_candidate(
        prompt,
        text_column(row, columns.model, place),
        text_column(row, columns.response, place),
        None if response_id is None else str(response_id),
    )
    return prompt, (candidate,)


def import_candidates(
    config: ImportedCandidates, rows: Iterable[tuple[str, Row]], prompt_ids: frozenset[str]
) -> Iterator[Candidate | Dropped]:
    """The table's answers to these prompts, each once; the others are dropped with a reason."""
    seen: set[str] = set()
    for place, row in rows:
        prompt, candidates = parse_import(config, place, row)
        for candidate in candidates:
            record = f"{candidate.candidate_id}@{prompt.source}"
            if candidate.prompt_id not in prompt_ids:
                yield Dropped(
                    "candidates", record, candidate.prompt_id, "unknown_prompt", prompt.source
                )
            elif candidate.candidate_id in seen:
                yield Dropped("candidates", record, candidate.prompt_id, "duplicate", prompt.source)
            else:
                seen.add(candidate.candidate_id)
                yield candidate


def imported_prompts(configs: Iterable[ImportedCandidates]) -> Iterator[Prompt]:
    """The prompts that imported answers answer, each once, in the order of the tables."""
    seen: set[str] = set()
    for config in configs:
        for place, row in read_rows(config.source, config.split):
            prompt, _ = parse_import(config, place, row)
            if prompt.prompt_id not in seen:
                seen.add(prompt.prompt_id)
                yield prompt
