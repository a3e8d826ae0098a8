"""Argilla's REST API, with one user's key: patient while a server restarts, clear where it fails.

Argilla's Python client is not used: it loses the ranks of a ranking.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from preferences.errors import InputError, ServiceError

KEY_VARIABLE = "ARGILLA_API_KEY"
VERSIONS = ((2, 8), (3, 0))
"""From the first, up to but not including the second."""
PATIENCE = 90.0
"""Seconds that a server which answered before may be away: a restart takes ten."""
LONGEST_PAUSE = 4.0
TIMEOUT = 120.0
RETRIED = {408, 425, 429, 500, 502, 503, 504}
FIRST_PAGES = (50, 41, 29)
"""Records of the first page; another number each time that all are read again."""
PAGE_CHARACTERS, LONGEST_PAGE = 4_000_000, 1000
"""Of the next: about so many characters, for the server sorts all records for each page."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class User:
    """Whose key it is."""

    username: str
    role: str
    """`owner` or `admin`; annotators may not read what others say."""


class Argilla:
    """Requests to a server. What is asked for may arrive twice, so it only asks what it may."""

    def __init__(self, url: str, api_key: str) -> None:
        self._shown_url = _shown(url)
        self._heard = False
        self._http = httpx.Client(
            base_url=f"{url.rstrip('/')}/api/v1",
            # Compressing costs the server more than it saves.
            headers={"X-Argilla-Api-Key": api_key, "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(TIMEOUT, connect=10.0),
            trust_env=False,
        )

    def get(self, path: str, **query: Any) -> Any:
        """The reply."""
        return self._ask("GET", path, None, query)

    def create(self, path: str, body: Json) -> Any:
        """The new thing, which bears a name, or None where there is one of this name."""
        return self._ask("POST", path, body, {}, ignored={409})

    def put(self, path: str, body: Json | None = None) -> Any:
        """The reply."""
        return self._ask("PUT", path, body, {})

    def change(self, path: str, body: Json) -> Any:
        """The reply."""
        return self._ask("PATCH", path, body, {})

    def delete(self, path: str, **query: Any) -> None:
        """No reply; what is gone already is no error."""
        self._ask("DELETE", path, None, query, ignored={404})

    def records(self, dataset_id: str) -> Iterator[Json]:
        """All records of a dataset with their responses and suggestions, each once.

        Raises ServiceError if records come and go all the while.
        """
        seen: set[str] = set()
        for first in FIRST_PAGES:
            read: set[str] = set()
            totals: set[int] = set()
            offset, size = 0, first
            while not totals or offset < max(totals):
                page, total = self.page(dataset_id, offset, size)
                totals.add(total)
                for record in page:
                    read.add(record["id"])
                    if record["id"] not in seen:
                        seen.add(record["id"])
                        yield record
                offset += size
                length = sum(len(str(record["fields"])) for record in page) // max(len(page), 1)
                size = min(max(PAGE_CHARACTERS // max(length, 1), 1), LONGEST_PAGE)
            # One that was deleted meanwhile has moved others to a page that was read before.
            if totals == {len(read)}:
                return
        raise ServiceError(
            f"{self._shown_url}: a dataset's records come and go while they are read; "
            "run the same again"
        )

    def page(self, dataset_id: str, offset: int, limit: int) -> tuple[list[Json], int]:
        """Some records with their responses and suggestions, and how many there are in all."""
        query = {"include": ["responses", "suggestions"], "offset": offset, "limit": limit}
        reply = self._ask("GET", f"/datasets/{dataset_id}/records", None, query)
        return reply["items"], reply["total"]

    def me(self) -> User:
        """Whose key it is."""
        said = self.get("/me")
        return User(said["username"], said["role"])

    def _ask(
        self,
        method: str,
        path: str,
        body: Json | None,
        query: Mapping[str, Any],
        ignored: Collection[int] = (),
    ) -> Any:
        deadline = time.monotonic() + (PATIENCE if self._heard else 0)
        pause = 0.1
        while True:
            reason, reply = "", None
            try:
                reply = self._http.request(method, path, json=body, params=query)
                if reply.status_code not in RETRIED:
                    break
                reason = f"status {reply.status_code}"
            except httpx.TransportError as error:
                reason = type(error).__name__
            except httpx.InvalidURL as error:
                raise InputError(f"--argilla-url {self._shown_url}: no URL ({error})") from None
            if time.monotonic() + pause > deadline:
                raise ServiceError(
                    f"no Argilla server answers at {self._shown_url} ({reason}); start it with "
                    "`pairwright label serve`, or name another with --argilla-url"
                )
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE)
        self._heard = True
        if reply.status_code in ignored:
            return None
        if not reply.is_success:
            raise self._refusal(reply, f"{method} {path}")
        return _json(reply) if reply.content else None

    def _refusal(self, reply: httpx.Response, asked: str) -> InputError | ServiceError:
        if reply.status_code == 401:
            return InputError(
                f"{KEY_VARIABLE}: Argilla at {self._shown_url} does not know this key; export the "
                "API key of an owner or admin, which Argilla shows under My settings"
            )
        if reply.status_code == 403:
            return InputError(
                f"{KEY_VARIABLE}: the user of this key may not do that at {self._shown_url} "
                f"({asked}); export the API key of an owner, or of an admin of the workspace"
            )
        said = _json(reply)
        detail = str(said.get("detail", said) if isinstance(said, dict) else said)
        return ServiceError(
            f"Argilla at {self._shown_url} refuses {asked} with status {reply.status_code}: "
            f"{' '.join(detail.split())[:300]}"
        )


def connect(url: str, api_key: str | None = None) -> Argilla:
    """A server that has been tried; the key is the environment's by default.

    Raises ServiceError if nothing answers, InputError if it is no Argilla of a version that this
    was written for, or the key is none of an owner or admin.
    """
    key = api_key or os.environ.get(KEY_VARIABLE)
    if not key:
        raise InputError(
            f"{KEY_VARIABLE} is not set; export the API key of an owner or admin of "
            f"{_shown(url)}, which Argilla shows under My settings"
        )
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise InputError(f"--argilla-url {_shown(url)}: no URL as http://127.0.0.1:6900")
    # A header takes nothing else; a key with a line break in it is one that was copied badly.
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{KEY_VARIABLE}: not a key; it has characters that no key has")
    api = Argilla(url, key)
    said = api._ask("GET", "/version", None, {}, ignored={404})
    version = said.get("version") if isinstance(said, dict) else None
    if not isinstance(version, str):
        raise InputError(f"--argilla-url {_shown(url)}: what answers there is no Argilla server")
    numbers = tuple(int(n) if n.isdigit() else 0 for n in version.split(".")[:2])
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        raise InputError(
            f"--argilla-url {_shown(url)}: Argilla {version}; this works with "
            f"{'.'.join(map(str, VERSIONS[0]))} and later, before {VERSIONS[1][0]}"
        )
    user = api.me()
    if user.role not in ("owner", "admin"):
        raise InputError(
            f"{KEY_VARIABLE}: {user.username} is an {user.role} at {_shown(url)}; export the API "
            "key of an owner, or of an admin of the workspace"
        )
    return api


def _shown(url: str) -> str:
    """Without a password that it may carry."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def _json(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return {}
