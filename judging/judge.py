"""What a judge is: groups of candidates in, judgments out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from preferences.records import Candidate, Judgment, Prompt


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and the candidates that answer it."""

    prompt: Prompt
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two candidates in the order in which a judge is to read them."""

    prompt: Prompt
    first: Candidate
    second: Candidate

    def swap(self) -> Comparison:
        """The same two in the other order."""
        return Comparison(self.prompt, self.second, self.first)


class Judge(Protocol):
    """Says which candidates are better."""

    def __call__(self, groups: Iterable[Group]) -> Iterator[Judgment]:
        """Yield the judgments on every group, in an order that depends on the groups alone."""
        ...
