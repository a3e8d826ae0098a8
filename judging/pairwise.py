"""A model reads two answers and says which is better, in both orders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

from generation.engine import Completion, Engine, EngineConfig, Request, Sampling
from judging.judge import Comparison, Group, Judge
from judging.rubric import Rubric
from judging.schedule import all_pairs_both_orders
from judging.verdicts import letter
from preferences.fingerprint import fingerprint
from preferences.records import Judgment, Message

VERDICTS = ("A", "B")
MIN_VERDICT_MASS = 0.05
"""Below this, the model wanted to say something else and its leaning means little."""
_ONE_TOKEN = Sampling(temperature=0.0, max_tokens=1)


class PairwiseJudge(EngineConfig):
    """A language model that compares two answers."""

    kind: Literal["pairwise"]
    name: str
    """What the records call this judge."""
    rubric: str = "helpful"
    """A rubric that ships, by name, or a text file of your own."""


def pairwise(config: PairwiseJudge, rubric: Rubric, model_identity: str, engine: Engine) -> Judge:
    """A judge that reads the probabilities of its verdict tokens, or else its words."""

    def judge(groups: Iterable[Group]) -> Iterator[Judgment]:
        comparisons = [c for group in groups for c in all_pairs_both_orders(group)]
        requests = [_request(c, rubric, model_identity) for c in comparisons]
        completions = {c.request_id: c for c in engine.complete(requests)}
        for comparison, request in zip(comparisons, requests, strict=True):
            yield _judgment(config.name, comparison, completions[request.request_id])

    return judge


def _request(comparison: Comparison, rubric: Rubric, model_identity: str) -> Request:
    shown = [comparison.first.candidate_id, comparison.second.candidate_id]
    return Request(
        request_id=fingerprint([model_identity, rubric.identity, shown]),
        messages=(Message("user", rubric.render(comparison)),),
        sampling=_ONE_TOKEN,
        choices=VERDICTS,
    )


def _judgment(judge: str, comparison: Comparison, completion: Completion) -> Judgment:
    unread = Judgment(
        judgment_id=completion.request_id,
        prompt_id=comparison.prompt.prompt_id,
        kind="pairwise",
        judge=judge,
        candidate_ids=(comparison.first.candidate_id, comparison.second.candidate_id),
        reply=completion.text,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        cost=completion.cost,
    )
    if completion.finish_reason == "failed":
        return dataclasses.replace(unread, failure=completion.failure or "no reply")
    if completion.choice_probs is not None:
        return _from_probabilities(unread, *completion.choice_probs)
    verdict = letter(completion.text)
    if verdict is None:
        return dataclasses.replace(unread, failure="no verdict in reply")
    return dataclasses.replace(unread, verdict=verdict)


def _from_probabilities(unread: Judgment, first: float, second: float) -> Judgment:
    mass = first + second
    if mass < MIN_VERDICT_MASS:
        failure = f"only {mass:.3f} of the probability is on a verdict"
        return dataclasses.replace(unread, verdict_mass=mass, failure=failure)
    return dataclasses.replace(unread, probability=first / mass, verdict_mass=mass)
