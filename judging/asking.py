"""Questions to a language model, asked once more where the reply cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from generation.engine import Completion, Engine, Request, Sampling
from preferences.fingerprint import fingerprint
from preferences.records import Message

MIN_VERDICT_MASS = 0.05
"""Below this, the model wanted to say something else and its leaning means little."""
ONE_TOKEN = Sampling(temperature=0.0, max_tokens=1)
FEW_TOKENS = Sampling(temperature=0.0, max_tokens=32)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a model said to a question: one reply, or two where the first could not be read."""

    replies: tuple[Completion, ...]

    @property
    def last(self) -> Completion:
        """The reply that is to be read."""
        return self.replies[-1]

    @property
    def text(self) -> str:
        """All that was said."""
        return "\n\n".join(reply.text for reply in self.replies)


def ask(
    engine: Engine,
    requests: Sequence[Request],
    is_read: Callable[[Completion], bool],
    once_more: str,
    sampling: Sampling,
) -> list[Exchange]:
    """One exchange for each request, in their order.

    Where a reply holds no verdict, the model sees it again and is asked for the verdict alone, in
    the words of `once_more`: once. A call that failed is not made again, the engine has tried.
    """
    first = {c.request_id: c for c in engine.complete(requests)}
    again = {
        request.request_id: _follow_up(request, first[request.request_id], once_more, sampling)
        for request in requests
        if first[request.request_id].finish_reason != "failed"
        and not is_read(first[request.request_id])
    }
    second = {c.request_id: c for c in engine.complete(list(again.values()))} if again else {}
    exchanges = []
    for request in requests:
        replies = [first[request.request_id]]
        if request.request_id in again:
            replies.append(second[again[request.request_id].request_id])
        exchanges.append(Exchange(tuple(replies)))
    return exchanges


def unread(completion: Completion) -> str:
    """Why there is no verdict in a completion that holds none."""
    if completion.finish_reason == "failed":
        return completion.failure or "no reply"
    if completion.finish_reason == "length":
        return "cut off before a verdict"
    return "no verdict in reply"


def spent(exchanges: Iterable[Exchange]) -> dict[str, Any]:
    """Tokens and cost of all replies together, as a judgment holds them; None where unknown."""
    replies = [reply for exchange in exchanges for reply in exchange.replies]
    return {
        name: sum(known) if (known := [v for v in values if v is not None]) else None
        for name, values in (
            ("prompt_tokens", [r.prompt_tokens for r in replies]),
            ("completion_tokens", [r.completion_tokens for r in replies]),
            ("cost", [r.cost for r in replies]),
        )
    }


def _follow_up(request: Request, reply: Completion, words: str, sampling: Sampling) -> Request:
    if reply.text.strip():
        turns = (Message("assistant", reply.text), Message("user", words))
        messages = (*request.messages, *turns)
    else:
        # Templates refuse a turn without words, and two turns of the same speaker.
        *before, question = request.messages
        messages = (*before, Message("user", f"{question.content}\n\n{words}"))
    identity = fingerprint([request.request_id, "again"])
    return Request(identity, messages, sampling, seed=request.seed)
