"""An engine that remembers: it answers from the journal and asks another engine for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from generation.engine import Completion, Engine, Request
from preferences.fingerprint import fingerprint
from preferences.journal import Journal


@dataclasses.dataclass
class JournalledEngine:
    """Meets `Engine`. Every reply is on record before it is handed on."""

    engine: Engine
    model_identity: str
    """What the engine is, as `generation.models` names it; part of each call's key."""
    journal: Journal
    on_reply: Callable[[Completion, bool], None] = lambda completion, was_recorded: None
    """Told of every reply and whether it was on record: for progress and cost."""

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Recorded replies first, then the owed ones as they arrive."""
        owed: dict[str, Request] = {}
        keys: dict[str, str] = {}
        for request in requests:
            key = call_key(self.model_identity, request)
            completion = _completion(request.request_id, self.journal.get(key))
            if completion is None:
                owed[request.request_id] = request
                keys[request.request_id] = key
            else:
                self.on_reply(completion, True)
                yield completion
        if owed:
            for completion in self.engine.complete(owed.values()):
                reply = dataclasses.asdict(completion)
                del reply["request_id"]
                self.journal.put(keys[completion.request_id], reply)
                self.on_reply(completion, False)
                yield completion


def call_key(model_identity: str, request: Request) -> str:
    """Identity of a call: the model and everything in the request that can change the reply."""
    return fingerprint(
        [
            model_identity,
            [[m.role, m.content] for m in request.messages],
            request.sampling,
            request.seed,
            request.choices,
        ]
    )


def _completion(request_id: str, reply: dict[str, Any] | None) -> Completion | None:
    if reply is None:
        return None
    try:
        probs = reply.get("choice_probs")
        if isinstance(probs, list):
            reply = {**reply, "choice_probs": tuple(float(p) for p in probs)}
        return Completion(request_id, **reply)
    except (TypeError, ValueError):
        return None  # Malformed: the call is owed again.
