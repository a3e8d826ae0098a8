"""Two shortcuts inside the Argilla server; without them it takes 40 records a second.

Runs inside the Argilla server, so it imports nothing of Pairwright. What the server does stays the
same.
"""

# What is imported is in Argilla's environment, where types are not checked.
# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any


def take() -> None:
    """Put the shortcuts into the server, which must not have started yet."""
    _parse_settings_quickly()
    _build_events_only_for_webhooks()


def _parse_settings_quickly() -> None:
    """Argilla builds a parser for each metadata value and each answer, of two types in all."""
    from argilla_server.models import database

    build = database.TypeAdapter
    made: dict[int, Any] = {}

    def adapter(settings: Any) -> Any:
        # By identity: the types are constants of modules, and have no hash.
        if id(settings) not in made:
            made[id(settings)] = build(settings)
        return made[id(settings)]

    database.TypeAdapter = adapter


def _build_events_only_for_webhooks() -> None:
    """Argilla reads eight tables for each record and answer before it looks who wants to know."""
    from argilla_server.contexts import datasets, records
    from argilla_server.webhooks.v1 import records as of_records
    from argilla_server.webhooks.v1 import responses as of_responses

    of_record = _if_wanted(of_records.build_record_event)
    of_response = _if_wanted(of_responses.build_response_event)
    of_records.build_record_event = records.build_record_event_v1 = of_record
    of_responses.build_response_event = datasets.build_response_event_v1 = of_response


class _NoEvent:
    async def notify(self, db: Any) -> list[Any]:
        return []


def _if_wanted(build: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    from argilla_server.contexts.webhooks import list_enabled_webhooks

    @functools.wraps(build)
    async def build_if_wanted(db: Any, event: Any, about: Any) -> Any:
        # Once a request: each has a session of its own.
        if "wanted events" not in db.info:
            hooks = await list_enabled_webhooks(db)
            db.info["wanted events"] = {_name(wanted) for hook in hooks for wanted in hook.events}
        is_wanted = _name(event) in db.info["wanted events"]
        return await build(db, event, about) if is_wanted else _NoEvent()

    return build_if_wanted


def _name(event: Any) -> str:
    return str(getattr(event, "value", event))
