"""A model gives its reasons about two answers before it says which is better."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from generation.engine import Completion, Engine, Request, Sampling
from judging.asking import Exchange, ask, spent, unread
from judging.judge import Comparison, Judge
from judging.pairwise import ComparingJudge, scheduled
from judging.raters import OUTRIGHT
from judging.rubric import Rubric
from judging.schedule import Compare, Schedule, all_pairs
from judging.verdicts import alone, final
from preferences.fingerprint import fingerprint
from preferences.records import Judgment, Message, Verdict

ONCE_MORE = (
    "Now give the verdict alone: reply with [[A]], [[B]] or, if neither is better, [[C]], and "
    "nothing else."
)


class ReasonedPairwiseJudge(ComparingJudge):
    """A language model that reasons about two answers and ends with its verdict."""

    kind: Literal["pairwise_reasoned"]
    samples: int = Field(1, ge=1)
    """Replies to each comparison. Of several, the share of the verdicts for the first is the
    probability that the first is better; a tie counts as half."""
    temperature: float = Field(0.7, ge=0, le=5)
    """At which replies are drawn. At 0 all would be the same, so several need more."""
    max_tokens: int = Field(1024, ge=1)
    """Longest reply, in tokens, hidden reasoning included."""

    @model_validator(mode="after")
    def _samples_differ(self) -> ReasonedPairwiseJudge:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples: {self.samples} at temperature 0 are {self.samples} times the same; "
                "raise `temperature`, or take one sample"
            )
        return self


def pairwise_reasoned(
    config: ReasonedPairwiseJudge,
    rubric: Rubric,
    model_identity: str,
    engine: Engine,
    schedule: Schedule = all_pairs,
) -> Judge:
    """A judge that gives its reasons first."""
    return scheduled(by_reasoning(config, rubric, model_identity, engine), schedule)


def by_reasoning(
    config: ReasonedPairwiseJudge, rubric: Rubric, model_identity: str, engine: Engine
) -> Compare:
    """Comparisons by the verdicts at the end of one or several replies."""
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens)

    def compare(comparisons: Sequence[Comparison]) -> list[Judgment]:
        identities = [
            fingerprint([model_identity, rubric.identity, _shown(c), config.samples, sampling])
            for c in comparisons
        ]
        requests = [
            _request(rubric.render(comparison), identity, sample, sampling)
            for comparison, identity in zip(comparisons, identities, strict=True)
            for sample in range(config.samples)
        ]
        exchanges = ask(engine, requests, _is_read, ONCE_MORE, sampling)
        return [
            _judgment(
                config.name,
                comparison,
                identity,
                exchanges[number * config.samples : (number + 1) * config.samples],
            )
            for number, (comparison, identity) in enumerate(
                zip(comparisons, identities, strict=True)
            )
        ]

    return compare


def _shown(comparison: Comparison) -> tuple[str, str]:
    return comparison.first.candidate_id, comparison.second.candidate_id


def _request(question: str, identity: str, sample: int, sampling: Sampling) -> Request:
    request_id = fingerprint([identity, sample])
    # A seed of its own, so that a reply can be drawn again and no two share their noise.
    seed = int(request_id, 16) % 2**31
    return Request(request_id, (Message("user", question),), sampling, seed=seed)


def _is_read(completion: Completion) -> bool:
    return _verdict(completion) is not None


def _verdict(completion: Completion) -> Verdict | None:
    # A reply that was cut off had more to say: what it ends with is no verdict.
    if completion.finish_reason != "stop":
        return None
    return final(completion.text) or alone(completion.text)


def _judgment(
    judge: str, comparison: Comparison, identity: str, exchanges: Sequence[Exchange]
) -> Judgment:
    judgment = Judgment(
        judgment_id=identity,
        prompt_id=comparison.prompt.prompt_id,
        kind="pairwise_reasoned",
        judge=judge,
        candidate_ids=_shown(comparison),
        reply="\n\n---\n\n".join(exchange.text for exchange in exchanges),
        **spent(exchanges),
    )
    verdicts = [v for e in exchanges if (v := _verdict(e.last)) is not None]
    if not verdicts:
        return dataclasses.replace(judgment, failure=unread(exchanges[0].last))
    if len(exchanges) == 1:
        return dataclasses.replace(judgment, verdict=verdicts[0])
    return dataclasses.replace(
        judgment,
        probability=sum(OUTRIGHT[v] for v in verdicts) / len(verdicts),
        verdict_mass=len(verdicts) / len(exchanges),
    )
