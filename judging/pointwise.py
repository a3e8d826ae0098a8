"""A model scores each answer by itself, from 1 to 5, by one or several criteria."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from generation.engine import Completion, Engine, EngineConfig, Request
from judging.asking import FEW_TOKENS, MIN_VERDICT_MASS, ONE_TOKEN, Exchange, ask, spent, unread
from judging.judge import Group, Judge
from judging.rubric import Rubric
from judging.verdicts import score
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Judgment, Message, Prompt

SCORES = ("1", "2", "3", "4", "5")
ONCE_MORE = "Now give the score alone: reply with one digit, 1 to 5, and nothing else."


class PointwiseJudge(EngineConfig):
    """A language model that scores each answer by itself, from 1 to 5."""

    kind: Literal["pointwise"]
    name: str
    """What the records call this judge."""
    criteria: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {"helpful": 1.0}, min_length=1
    )
    """Rubrics by name, or text files of your own, each with its weight: the score is the weighted
    mean of theirs."""


def pointwise(
    config: PointwiseJudge, rubrics: Mapping[str, Rubric], model_identity: str, engine: Engine
) -> Judge:
    """A judge that asks for one digit by each criterion, and takes the digit it expects.

    Where the engine gives the probabilities of the digits, a criterion's score is Σ s·p(s) / Σ p(s)
    (Liu et al. 2023, "G-Eval", eq. 1), or else the digit itself. An answer of which one criterion
    cannot be read has no score.
    """
    weights = [(rubrics[name], weight) for name, weight in config.criteria.items()]
    asked_by = [(rubric.identity, weight) for rubric, weight in weights]

    def judge(groups: Iterable[Group]) -> Iterator[Judgment]:
        answers = [(group.prompt, c) for group in groups for c in group.candidates]
        requests = [
            _request(rubric, prompt, candidate, model_identity)
            for prompt, candidate in answers
            for rubric, _ in weights
        ]
        exchanges = ask(engine, requests, _is_read, ONCE_MORE, FEW_TOKENS)
        for number, (_, candidate) in enumerate(answers):
            said = exchanges[number * len(weights) : (number + 1) * len(weights)]
            identity = fingerprint([model_identity, asked_by, candidate.candidate_id])
            yield _judgment(config.name, candidate, identity, weights, said)

    return judge


def _request(rubric: Rubric, prompt: Prompt, candidate: Candidate, model_identity: str) -> Request:
    return Request(
        request_id=fingerprint([model_identity, rubric.identity, candidate.candidate_id]),
        messages=(Message("user", rubric.render_one(prompt, candidate)),),
        sampling=ONE_TOKEN,
        choices=SCORES,
    )


def _is_read(completion: Completion) -> bool:
    return completion.choice_probs is not None or _digit(completion) is not None


def _digit(completion: Completion) -> int | None:
    return score(completion.text) if completion.finish_reason == "stop" else None


def _judgment(
    judge: str,
    candidate: Candidate,
    identity: str,
    weights: Sequence[tuple[Rubric, float]],
    said: Sequence[Exchange],
) -> Judgment:
    total, masses, failures = 0.0, [], []
    for (rubric, weight), exchange in zip(weights, said, strict=True):
        probabilities = exchange.last.choice_probs
        found: float | None
        if probabilities is not None:
            mass = sum(probabilities)
            masses.append(mass)
            found = expected_score(probabilities)
            failure = f"only {mass:.3f} of the probability is on a score"
        else:
            found, failure = _digit(exchange.last), unread(exchange.last)
        if found is None:
            failures.append(f"{rubric.name}: {failure}")
        else:
            total += weight * found
    return Judgment(
        judgment_id=identity,
        prompt_id=candidate.prompt_id,
        kind="pointwise",
        judge=judge,
        candidate_ids=(candidate.candidate_id,),
        scores=None if failures else (total / sum(weight for _, weight in weights),),
        verdict_mass=min(masses, default=None),
        failure=failures[0] if failures else None,
        reply="\n".join(
            f"{rubric.name}: {_told(exchange)}"
            for (rubric, _), exchange in zip(weights, said, strict=True)
        ),
        **spent(said),
    )


def expected_score(probabilities: Sequence[float]) -> float | None:
    """Σ s·p(s) / Σ p(s) over the scores 1 to 5; None where hardly any probability is on them."""
    mass = sum(probabilities)
    if mass < MIN_VERDICT_MASS:
        return None
    return sum(s * p for s, p in enumerate(probabilities, start=1)) / mass


def _told(exchange: Exchange) -> str:
    """The score that the probabilities expect, or else the words."""
    probabilities = exchange.last.choice_probs
    found = expected_score(probabilities) if probabilities is not None else None
    return exchange.text if found is None else f"{found:.2f}"
