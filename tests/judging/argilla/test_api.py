"""What happens when the server is away, is another one, or does not know the key."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from judging.argilla import api
from judging.argilla.api import Argilla, connect
from judging.argilla.server import Address
from preferences.errors import InputError, ServiceError
from tests.judging.argilla.argilla_api import TEXT, Client, create_dataset, labels
from tests.judging.argilla.labellers import key_of

NOWHERE = "http://127.0.0.1:9"
KEY = "a-key-that-nobody-may-read"


def test_a_server_that_is_not_there_is_told_at_once_with_the_cure() -> None:
    begun = time.monotonic()
    with pytest.raises(
        ServiceError, match=r"127\.0\.0\.1:9 .*label serve.*--argilla-url"
    ) as caught:
        connect(NOWHERE, KEY)
    assert time.monotonic() - begun < 5
    assert KEY not in str(caught.value)


def test_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARGILLA_API_KEY", raising=False)
    with pytest.raises(InputError, match="ARGILLA_API_KEY is not set"):
        connect(NOWHERE)


@pytest.mark.parametrize("key", [KEY, f"{KEY}\nX: y", f"{KEY}é"])
def test_a_wrong_key_names_its_variable_and_not_itself(argilla: Address, key: str) -> None:
    with pytest.raises(InputError, match=r"ARGILLA_API_KEY: .*key") as caught:
        connect(argilla.url, key)
    assert KEY not in str(caught.value)


def test_the_key_is_in_the_environment_by_default(
    argilla: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGILLA_API_KEY", key_of(argilla, "admin"))
    assert connect(f"{argilla.url}/").me().username == "admin"


def test_an_annotators_key_is_not_enough(argilla: Address) -> None:
    with pytest.raises(InputError, match="annotator is an annotator"):
        connect(argilla.url, key_of(argilla, "annotator"))


@pytest.mark.parametrize("url", ["127.0.0.1:6900", "ftp://127.0.0.1", "http://", ""])
def test_what_is_no_url_is_named(url: str) -> None:
    with pytest.raises(InputError, match="no URL as http://"):
        connect(url, KEY)


@pytest.mark.parametrize("version", ["2.7.1", "1.29.1", "3.0.0"])
def test_another_version_is_refused(version: str) -> None:
    refused = pytest.raises(InputError, match=rf"Argilla {version}.*2\.8")
    with answering([(200, {"version": version})]) as url, refused:
        connect(url, KEY)


@pytest.mark.parametrize("reply", [(200, {"hello": "world"}), (404, {}), (200, None)])
def test_what_is_no_argilla_is_refused(reply: tuple[int, object]) -> None:
    with answering([reply]) as url, pytest.raises(InputError, match="no Argilla server"):
        connect(url, KEY)


def test_a_password_in_the_url_is_not_shown() -> None:
    with pytest.raises(ServiceError) as caught:
        connect("http://somebody:secret@127.0.0.1:9", KEY)
    assert "secret" not in str(caught.value)


def test_a_server_that_was_there_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering([(200, 1), (503, None), (500, None), (200, 2)]) as url:
        server = Argilla(url, KEY)
        assert [server.get("/"), server.get("/")] == [1, 2]
    with answering([(200, 3)], port=int(url.rpartition(":")[2]), after=1.5):
        assert server.get("/") == 3  # It began to ask while nobody was listening.
    monkeypatch.setattr(api, "PATIENCE", 0.5)
    with pytest.raises(ServiceError, match="no Argilla server answers"):
        server.get("/")


def test_what_argilla_refuses_is_told_in_a_line(argilla: Address) -> None:
    server = connect(argilla.url, key_of(argilla, "owner"))
    with pytest.raises(ServiceError, match=r"refuses POST /datasets with status 422: ") as caught:
        server.create("/datasets", {"name": "x" * 1000})
    assert "\n" not in str(caught.value)


def test_records_that_are_deleted_while_all_are_read_hide_no_others(
    argilla: Address, owner: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "FIRST_PAGES", (4, 3, 5))
    name = f"deleted-{time.monotonic_ns()}"
    made = create_dataset(owner, name, {"prompt": TEXT}, {"better": labels("a", "b")})
    ids = made.add([{"fields": {"prompt": str(n)}} for n in range(12)])
    reading = connect(argilla.url, key_of(argilla, "owner")).records(made.id)
    read = [next(reading)["id"]]
    # The fifth moves to the place of the fourth, on the page that is being read.
    owner("DELETE", f"/records/{ids[0]}")
    read += [record["id"] for record in reading]
    assert sorted(read) == sorted(ids)


@contextmanager
def answering(replies: list[tuple[int, object]], port: int = 0, after: float = 0) -> Iterator[str]:
    """A server that gives these replies, and none when they are used up; it may come late."""
    left = iter(replies)

    class Told(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = next(left)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>" if body is None else json.dumps(body).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", port), Told, bind_and_activate=False)
    server.allow_reuse_address = True

    def serve() -> None:
        time.sleep(after)
        if after:
            listen()
        server.serve_forever(poll_interval=0.05)

    def listen() -> None:
        server.server_bind()
        server.server_activate()

    if not after:
        listen()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port or server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
