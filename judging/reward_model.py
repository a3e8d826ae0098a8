"""A sequence-classification model that scores each answer by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from judging.judge import Group, Judge
from preferences.config import Config
from preferences.errors import InputError, MissingExtra
from preferences.fingerprint import fingerprint
from preferences.journal import Journal
from preferences.records import Judgment, Message, Messages

Scorer = Callable[[Sequence[Messages]], list[float]]
"""Whole conversations in, one score each out."""


class RewardModelJudge(Config):
    """A reward model: the difference of two scores is the log-odds that the first is better."""

    kind: Literal["reward_model"]
    name: str
    """What the records call this judge."""
    model: str
    """A folder with weights, or a Hub id, of a model with one output."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The numbers the model computes with."""
    trust_remote_code: bool = False
    """Run Python that comes with the model. Say true only for a model you have read."""


@contextmanager
def open_reward_model(config: RewardModelJudge) -> Iterator[Scorer]:
    """Load the model; its memory is free again when the block ends."""
    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise MissingExtra('a reward model needs: pip install "pairwright[train]"') from error
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model, **options)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        config.model, dtype=config.dtype, **options
    ).eval()
    if model.config.num_labels != 1:
        raise InputError(
            f"{config.model}: has {model.config.num_labels} outputs; a reward model has one"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def score(conversations: Sequence[Messages]) -> list[float]:
        scores = []
        for conversation in conversations:
            turns = [{"role": m.role, "content": m.content} for m in conversation]
            tokens = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
            # One at a time: padding never enters, so a score does not depend on its neighbours.
            with torch.inference_mode():
                scores.append(float(model(**tokens.to(device)).logits[0, 0]))
        return scores

    yield score


def reward_model(
    config: RewardModelJudge, model_identity: str, score: Scorer, journal: Journal
) -> Judge:
    """A judge that scores every answer once; scores on record are not computed again."""

    def judge(groups: Iterable[Group]) -> Iterator[Judgment]:
        for group in groups:
            for candidate in group.candidates:
                turns = (*group.prompt.messages, Message("assistant", candidate.response))
                key = fingerprint([model_identity, [[m.role, m.content] for m in turns]])
                recorded = journal.get(key)
                if recorded is None or not isinstance(recorded.get("score"), float):
                    recorded = {"score": score([turns])[0]}
                    journal.put(key, recorded)
                found = recorded["score"]
                is_number = math.isfinite(found)
                yield Judgment(
                    judgment_id=fingerprint([model_identity, candidate.candidate_id]),
                    prompt_id=group.prompt.prompt_id,
                    kind="reward_model",
                    judge=config.name,
                    candidate_ids=(candidate.candidate_id,),
                    scores=(found,) if is_number else None,
                    failure=None if is_number else f"the score is no number: {found}",
                )

    return judge
