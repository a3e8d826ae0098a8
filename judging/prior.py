"""Preferences without judging: a strong model's answer over a weak one's, a person's over both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Literal

from pydantic import Field

from judging.judge import Group, Judge
from preferences.config import Config
from preferences.fingerprint import fingerprint
from preferences.records import Judgment


class Prior(Config):
    """An order of who answers better, taken as given."""

    kind: Literal["prior"]
    name: str
    """What the records call this judge."""
    order: tuple[str, ...] = Field(min_length=2)
    """Names of models or people, the best first. Answers by others are not compared."""


def prior(config: Prior) -> Judge:
    """A judge that says of every two answers: the one whose author stands higher is better."""
    place = {model: number for number, model in enumerate(config.order)}

    def judge(groups: Iterable[Group]) -> Iterator[Judgment]:
        for group in groups:
            known = [c for c in group.candidates if c.model in place]
            for one, other in combinations(known, 2):
                if one.model == other.model:
                    continue
                shown = (one.candidate_id, other.candidate_id)
                one_is_better = place[one.model] < place[other.model]
                yield Judgment(
                    judgment_id=fingerprint(["prior", config.order, shown]),
                    prompt_id=group.prompt.prompt_id,
                    kind="prior",
                    judge=config.name,
                    candidate_ids=shown,
                    scores=(1.0, 0.0) if one_is_better else (0.0, 1.0),
                )

    return judge
