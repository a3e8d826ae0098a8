"""Prompts with answers to them."""

from __future__ import annotations

from judging.judge import Group
from preferences.conversations import imported_candidate, make_prompt
from preferences.records import Judgment, Message


def group(*answers: str, question: str = "Why?", source_id: str | None = None) -> Group:
    """A prompt and its answers; the n-th is by the model `model n`, counted from 0."""
    prompt = make_prompt((Message("user", question),), "prompts.jsonl:1", source_id)
    return Group(
        prompt,
        tuple(imported_candidate(prompt, f"model {n}", text) for n, text in enumerate(answers)),
    )


def judged(
    of: Group, first: int, second: int, probability: float | None, **said: object
) -> Judgment:
    """A judgment on two of a group's candidates, by their places, in the order shown."""
    shown = (of.candidates[first].candidate_id, of.candidates[second].candidate_id)
    return Judgment(
        judgment_id=f"{first}-{second}-{probability}-{said}",
        prompt_id=of.prompt.prompt_id,
        kind="pairwise",
        judge="j",
        candidate_ids=shown,
        probability=probability,
        **said,  # type: ignore[arg-type]
    )
