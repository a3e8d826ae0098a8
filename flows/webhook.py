"""Being told by Argilla that something was answered, so that nobody waits for the next poll.

Argilla tries to deliver a few times and then forgets: what people said is read by the poll, and
this only starts it sooner.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from judging.argilla.api import Argilla

EVENTS = ("record.completed",)
DESCRIPTION = "pairwright up"
PAUSE = 10.0
"""Seconds between being told and acting: answers come in bursts."""


@contextmanager
def told_of_answers(api: Argilla, act: Callable[[], None], pause: float = PAUSE) -> Iterator[None]:
    """Inside, `act` is called soon after a record has got its answers in this machine's server.

    Of the server's webhooks, those of earlier processes that were killed are taken away.
    """
    # What is sent is not read, and who does not know the path cannot even cause a poll.
    path = f"/{secrets.token_urlsafe(16)}"
    told, over = threading.Event(), threading.Event()

    class Told(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer at once, whatever it is."""
            if self.path == path:
                told.set()
            self.send_response(204 if self.path == path else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the path is a secret."""

    def work() -> None:
        while not over.is_set():
            if told.wait(0.5) and not over.wait(pause):
                told.clear()
                try:
                    act()
                except Exception as error:
                    # The poll comes all the same, only later.
                    print(f"! the poll for labels could not be started ({error})", flush=True)

    for hook in api.get("/webhooks")["items"]:
        if hook["description"] == DESCRIPTION:
            api.delete(f"/webhooks/{hook['id']}")
    with ThreadingHTTPServer(("127.0.0.1", 0), Told) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        threading.Thread(target=work, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}{path}"
        body = {"url": url, "events": list(EVENTS), "description": DESCRIPTION}
        hook = api.create("/webhooks", body)
        try:
            yield
        finally:
            over.set()
            server.shutdown()
            api.delete(f"/webhooks/{hook['id']}")
