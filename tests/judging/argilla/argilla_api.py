"""A small client of Argilla's REST API, as a browser or a program uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

PAGE = 1000


class Client:
    """One user's requests; every reply that is not a success raises."""

    def __init__(self, url: str, api_key: str | None = None, token: str | None = None) -> None:
        headers = (
            {"X-Argilla-Api-Key": api_key} if api_key else {"Authorization": f"Bearer {token}"}
        )
        self._http = httpx.Client(
            base_url=f"{url}/api/v1", headers=headers, timeout=60, trust_env=False
        )

    def __call__(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        reply = self._http.request(method, path, json=body, params=query)
        assert reply.is_success, f"{method} {path}: {reply.status_code} {reply.text[:500]}"
        return reply.json() if reply.content else None


@dataclass(frozen=True)
class Dataset:
    """A published dataset."""

    client: Client
    id: str
    questions: Mapping[str, str]
    """The id of each question, by its name."""
    metadata: Mapping[str, str]
    """The id of each metadata property, by its name."""

    def add(self, items: Sequence[Mapping[str, Any]]) -> list[str]:
        """Add records; their ids, in order."""
        reply = self.client("POST", f"/datasets/{self.id}/records/bulk", {"items": items})
        return [item["id"] for item in reply["items"]]

    def search(
        self,
        text: str | None = None,
        field: str | None = None,
        filters: Sequence[Mapping[str, Any]] = (),
        sort: Sequence[tuple[Mapping[str, Any], str]] = (),
        vector: Mapping[str, Any] | None = None,
        user: Client | None = None,
        offset: int = 0,
        limit: int = PAGE,
    ) -> tuple[list[str], int]:
        """The ids found, in order, and how many there are in all."""
        reply = self.hits(text, field, filters, sort, vector, user, offset, limit)
        return [item["record"]["id"] for item in reply["items"]], reply["total"]

    def hits(
        self,
        text: str | None = None,
        field: str | None = None,
        filters: Sequence[Mapping[str, Any]] = (),
        sort: Sequence[tuple[Mapping[str, Any], str]] = (),
        vector: Mapping[str, Any] | None = None,
        user: Client | None = None,
        offset: int = 0,
        limit: int = PAGE,
    ) -> Any:
        """The whole reply to a search."""
        query: dict[str, Any] = {}
        if text is not None:
            query["text"] = {"q": text, "field": field}
        if vector is not None:
            query["vector"] = vector
        body: dict[str, Any] = {"query": query} if query else {}
        if filters:
            body["filters"] = {"and": filters}
        if sort:
            body["sort"] = [{"scope": scope, "order": order} for scope, order in sort]
        mine = "/me" if user else ""
        path = f"{mine}/datasets/{self.id}/records/search"
        return (user or self.client)("POST", path, body, offset=offset, limit=limit)


def create_dataset(
    client: Client,
    name: str,
    fields: Mapping[str, Mapping[str, Any]],
    questions: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, str] | None = None,
    vectors: Mapping[str, int] | None = None,
    min_submitted: int = 1,
) -> Dataset:
    """A new published dataset. Metadata maps names to types, vectors to dimensions."""
    (workspace,) = client("GET", "/me/workspaces")["items"]
    distribution = {"strategy": "overlap", "min_submitted": min_submitted}
    body = {"name": name, "workspace_id": workspace["id"], "distribution": distribution}
    path = f"/datasets/{client('POST', '/datasets', body)['id']}"
    for field, settings in fields.items():
        body = {"name": field, "title": field, "required": False, "settings": settings}
        client("POST", f"{path}/fields", body)
    question_ids, metadata_ids = {}, {}
    for question, settings in questions.items():
        body = {"name": question, "title": question, "required": True, "settings": settings}
        question_ids[question] = client("POST", f"{path}/questions", body)["id"]
    for name, kind in (metadata or {}).items():
        body = {"name": name, "title": name, "settings": {"type": kind}}
        body["visible_for_annotators"] = True
        metadata_ids[name] = client("POST", f"{path}/metadata-properties", body)["id"]
    for name, dimensions in (vectors or {}).items():
        body = {"name": name, "title": name, "dimensions": dimensions}
        client("POST", f"{path}/vectors-settings", body)
    client("PUT", f"{path}/publish")
    return Dataset(client, path.removeprefix("/datasets/"), question_ids, metadata_ids)


TEXT = {"type": "text", "use_markdown": False}


def labels(*options: str) -> dict[str, Any]:
    """The settings of a question with one answer among some labels."""
    shown = [{"value": option, "text": option} for option in options]
    return {"type": "label_selection", "options": shown, "visible_options": None}


def rating(highest: int) -> dict[str, Any]:
    """The settings of a question with a number from 1."""
    options = [{"value": value} for value in range(1, highest + 1)]
    return {"type": "rating", "options": options}
