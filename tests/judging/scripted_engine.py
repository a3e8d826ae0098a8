"""An engine that says what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from generation.engine import Completion, Request


@dataclass
class ScriptedEngine:
    """Meets `Engine`: answers by a function of the request, and remembers what it was asked."""

    answer: Callable[[Request], Completion]
    asked: list[Request] = field(default_factory=list)

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Replies in the opposite order, as an engine may."""
        owed = list(requests)
        self.asked += owed
        for request in reversed(owed):
            yield self.answer(request)


def says(text: str) -> ScriptedEngine:
    """An engine that always replies with these words."""
    return ScriptedEngine(lambda request: Completion(request.request_id, text, "stop"))


def leans(first: float, second: float) -> ScriptedEngine:
    """An engine that gives A and B these probabilities, whatever it reads."""
    return ScriptedEngine(
        lambda request: Completion(request.request_id, "A", "stop", choice_probs=(first, second))
    )
