"""A model reads two answers and says which is better, in both orders."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from pydantic import Field

from generation.engine import Completion, Engine, EngineConfig, Request
from judging.asking import FEW_TOKENS, MIN_VERDICT_MASS, ONE_TOKEN, Exchange, ask, spent, unread
from judging.judge import Comparison, Group, Judge
from judging.rubric import Rubric
from judging.schedule import MIN_GAIN, WORST, Compare, Schedule, all_pairs, carry_out
from judging.verdicts import alone
from preferences.fingerprint import fingerprint
from preferences.records import Judgment, Message, Verdict

VERDICTS = ("A", "B")
ONCE_MORE = "Now give the verdict alone: reply with one letter, A or B, and nothing else."


class ComparingJudge(EngineConfig):
    """A language model that compares answers two at a time."""

    name: str
    """What the records call this judge."""
    rubric: str = "helpful"
    """A rubric that ships, by name, or a text file of your own."""
    schedule: Literal["adaptive", "all_pairs", "knockout"] = "adaptive"
    """Which comparisons are asked. `adaptive`: round by round, what promises most; `all_pairs`:
    every pair in both orders; `knockout`: winners meet winners, to find the best alone. Two answers
    are always compared in both orders."""
    min_gain: float = Field(MIN_GAIN, gt=0)
    """`adaptive` asks on while a call is expected to better the best found, or worsen the worst, by
    this many standard deviations of quality: 0.005 to ask much, 0.05 to ask little."""
    worst: float = Field(WORST, ge=0, le=1)
    """How much finding the worst answer counts for `adaptive`; finding the best counts 1."""
    prior: str | None = None
    """An earlier judge of the recipe, as a reward model, whose judgments `adaptive` starts from."""


class PairwiseJudge(ComparingJudge):
    """A language model that says which of two answers is better, in one letter."""

    kind: Literal["pairwise"]


def pairwise(
    config: PairwiseJudge,
    rubric: Rubric,
    model_identity: str,
    engine: Engine,
    schedule: Schedule = all_pairs,
) -> Judge:
    """A judge that reads the probabilities of its verdict tokens, or else its words."""
    return scheduled(by_letter(config, rubric, model_identity, engine), schedule)


def scheduled(compare: Compare, schedule: Schedule) -> Judge:
    """A judge that is asked what a schedule wants to know."""

    def judge(groups: Iterable[Group]) -> Iterator[Judgment]:
        asked = list(groups)
        said: dict[str, list[Judgment]] = defaultdict(list)
        for judgment in carry_out(schedule(asked), compare):
            said[judgment.prompt_id].append(judgment)
        for group in asked:
            yield from said[group.prompt.prompt_id]

    return judge


def by_letter(
    config: PairwiseJudge, rubric: Rubric, model_identity: str, engine: Engine
) -> Compare:
    """Comparisons by one letter each: its probabilities, or else the letter itself."""

    def compare(comparisons: Sequence[Comparison]) -> list[Judgment]:
        requests = [_request(c, rubric, model_identity) for c in comparisons]
        exchanges = ask(engine, requests, _is_read, ONCE_MORE, FEW_TOKENS)
        return [
            _judgment(config.name, comparison, request.request_id, exchange)
            for comparison, request, exchange in zip(comparisons, requests, exchanges, strict=True)
        ]

    return compare


def _request(comparison: Comparison, rubric: Rubric, model_identity: str) -> Request:
    shown = [comparison.first.candidate_id, comparison.second.candidate_id]
    return Request(
        request_id=fingerprint([model_identity, rubric.identity, shown]),
        messages=(Message("user", rubric.render(comparison)),),
        sampling=ONE_TOKEN,
        choices=VERDICTS,
    )


def _is_read(completion: Completion) -> bool:
    return completion.choice_probs is not None or _verdict(completion) is not None


def _verdict(completion: Completion) -> Verdict | None:
    return alone(completion.text) if completion.finish_reason == "stop" else None


def _judgment(judge: str, comparison: Comparison, identity: str, exchange: Exchange) -> Judgment:
    judgment = Judgment(
        judgment_id=identity,
        prompt_id=comparison.prompt.prompt_id,
        kind="pairwise",
        judge=judge,
        candidate_ids=(comparison.first.candidate_id, comparison.second.candidate_id),
        reply=exchange.text,
        **spent([exchange]),
    )
    if exchange.last.choice_probs is not None:
        return _from_probabilities(judgment, *exchange.last.choice_probs)
    verdict = _verdict(exchange.last)
    if verdict is None:
        return dataclasses.replace(judgment, failure=unread(exchange.last))
    return dataclasses.replace(judgment, verdict=verdict)


def _from_probabilities(judgment: Judgment, first: float, second: float) -> Judgment:
    mass = first + second
    if mass < MIN_VERDICT_MASS:
        failure = f"only {mass:.3f} of the probability is on a verdict"
        return dataclasses.replace(judgment, verdict_mass=mass, failure=failure)
    return dataclasses.replace(judgment, probability=first / mass, verdict_mass=mass)
