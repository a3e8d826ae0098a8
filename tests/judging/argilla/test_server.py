"""The embedded server as a process: what it keeps, what it leaves behind, what it refuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from judging.argilla import server
from judging.argilla.environment import argilla_python
from judging.argilla.server import Address, answers, running, running_at
from preferences.errors import InputError, ServiceError
from tests.judging.argilla.argilla_api import TEXT, Client, Dataset, create_dataset, labels
from tests.judging.argilla.conftest import client_of

SERVE = (sys.executable, "-c", "from flows.cli import main; main()", "label", "serve")


def test_a_restart_keeps_datasets_answers_users_and_sessions(
    environment: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    others = family()
    with running(home, port=0) as address:
        ours = [process for process in family() if process not in others]
        assert len(ours) == 3  # the server, Redis, the worker
        owner, annotator = client_of(address, "owner"), client_of(address, "annotator")
        made = small_dataset(owner, ["a red fox", "a blue whale", "a red panda"])
        found, total = made.search("red")
        assert total == 2
        answer(annotator, found[0])
        token, key = sign_in(address), address.created[0].api_key
    assert gone(ours)
    # A text index that is lost, as a crash can lose a part of it, is made anew.
    (home / "search.db").unlink()
    with running(home, port=0) as address:
        assert address.created == ()
        again = Dataset(Client(address.url, key), made.id, {}, {})
        assert sorted(again.search("red")[0]) == sorted(found)
        (held,) = responses(again)
        assert (held["record_id"], held["status"]) == (found[0], "submitted")
        assert held["values"]["better"]["value"] == "second"
        signed_in = Client(address.url, token=token)
        assert signed_in("GET", "/me")["username"] == "annotator"
    assert (home / "secret").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_who_was_not_told_the_passwords_gets_new_ones(environment: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with running(home, port=0) as address:
        sign_in(address)
        lost = address
        made = small_dataset(client_of(address, "owner"), ["a red fox"])
    (home / "accounts-told").unlink()  # as when the first start was interrupted
    with running(home, port=0) as address:
        assert [a.username for a in address.created] == [a.username for a in lost.created]
        sign_in(address)
        owner = client_of(address, "owner")
        assert len(owner("GET", "/users")["items"]) == 3
        assert Dataset(owner, made.id, {}, {}).search("fox")[1] == 1
        with pytest.raises(httpx.HTTPStatusError):
            sign_in(Address(address.url, lost.created))


def test_passwords_are_in_no_file(environment: Path, argilla: Address, tmp_path: Path) -> None:
    """Argilla keeps their hashes."""
    (home,) = {Path(p.cwd()) for p in family() if "launch.py" in " ".join(p.cmdline())}
    held = b"".join(f.read_bytes() for f in home.rglob("*") if f.is_file() and f.parent == home)
    assert argilla.created[0].username.encode() in held
    for account in argilla.created:
        assert account.password.encode() not in held


def test_the_pages_are_served(argilla: Address) -> None:
    page = httpx.get(f"{argilla.url}/", trust_env=False)
    assert page.status_code == 200
    assert "<title>Argilla</title>" in page.text
    scripts = re.findall(r'src="(/[^"]+\.js)"', page.text)
    assert scripts
    for script in scripts:
        assert httpx.get(f"{argilla.url}{script}", trust_env=False).status_code == 200
    assert answers(argilla.url)
    assert not answers("http://127.0.0.1:9")


def test_a_webhook_tells_of_an_answer(owner: Client, annotator: Client) -> None:
    with listening() as (url, heard):
        hook = owner("POST", "/webhooks", {"url": url, "events": ["response.created"]})
        made = small_dataset(owner, ["a red fox"])
        answer(annotator, made.search()[0][0])
        assert within(20, lambda: bool(heard))
        owner("DELETE", f"/webhooks/{hook['id']}")


@pytest.mark.slow
def test_twenty_people_answer_at_once_and_every_answer_arrives(
    argilla: Address, owner: Client
) -> None:
    made = small_dataset(owner, [f"text {number}" for number in range(20)])
    (workspace,) = owner("GET", "/me/workspaces")["items"]
    people = []
    for number in range(20):
        name = f"person-{number}-{time.monotonic_ns()}"
        account = {"username": name, "first_name": name, "password": "a" * 10, "role": "annotator"}
        person = owner("POST", "/users", account)
        owner("POST", f"/workspaces/{workspace['id']}/users", {"user_id": person["id"]})
        people.append(Client(argilla.url, person["api_key"]))
    records = made.search()[0]

    def work(person: Client) -> None:
        for record in made.search(user=person)[0]:
            answer(person, record)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(work, people))
    held = [(r["record_id"], r["user_id"]) for r in responses(made)]
    assert len(held) == len(set(held)) == len(people) * len(records)
    assert owner("GET", f"/datasets/{made.id}/progress")["completed"] == len(records)


def test_a_port_in_use_is_named(environment: Path, argilla: Address, tmp_path: Path) -> None:
    port = int(argilla.url.rsplit(":", 1)[1])
    with pytest.raises(InputError, match=rf"port {port} on 127\.0\.0\.1 .*--port"):
        start(tmp_path / "home", port=port)


def test_an_address_that_is_not_this_machines_is_refused(environment: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"192\.0\.2\.1"):
        start(tmp_path / "home", host="192.0.2.1")


def test_a_folder_belongs_to_one_server(
    environment: Path, argilla: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STOP_SECONDS", 0.1)
    (home,) = {Path(p.cwd()) for p in family() if "launch.py" in " ".join(p.cmdline())}
    with pytest.raises(InputError, match="--home"), running(home, port=0):
        pass
    assert answers(argilla.url)


def test_a_server_that_cannot_start_says_why(environment: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "argilla.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ServiceError, match=r"not a database.*server\.log"):
        start(home)


@pytest.mark.slow
def test_a_killed_parent_leaves_no_process(environment: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(home) as (process, url, _):
        ours = [p for p in psutil.Process(process.pid).children(recursive=True)]
        assert len(ours) == 3  # the server, Redis, the worker
        process.kill()
        assert within(15, lambda: gone(ours))
        assert not answers(url)
    # The successor waits for what is still ending, and goes on.
    with serving(home) as (process, url, printed):
        assert not any("password" in line for line in printed)
        # Everything at once, as a machine under memory pressure might.
        ours = [p for p in psutil.Process(process.pid).children(recursive=True)]
        process.kill()
        os.kill(ours[0].pid, signal.SIGKILL)
        assert within(15, lambda: gone(ours))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_prints_accounts_once_and_stops_whole(
    environment: Path, tmp_path: Path, how: signal.Signals
) -> None:
    with serving(tmp_path / "home") as (process, url, printed):
        ours = [p for p in psutil.Process(process.pid).children(recursive=True)]
        assert sum("password" in line and "API key" in line for line in printed) == 3
        process.send_signal(how)
        assert process.wait(60) == 0
        assert gone(ours)
        assert not answers(url)


@pytest.mark.slow
def test_a_server_that_ends_is_told_of(environment: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "home") as (process, _, _):
        ours = [p for p in psutil.Process(process.pid).children(recursive=True)]
        os.kill(ours[0].pid, signal.SIGKILL)
        assert process.wait(60) == 1
        assert within(30, lambda: gone(ours))


@pytest.mark.slow
def test_an_environment_that_could_not_be_made_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said: list[str] = []
    with pytest.raises(ServiceError, match=r"from versions: none.*\.log.*run the same again"):
        argilla_python(said.append)
    assert "packages" in said[0]
    # One that was killed half-way leaves what it had made, under another name.
    (log,) = tmp_path.glob("pairwright/argilla-*.log")
    half_made = log.with_name(f"{log.stem}.building-1") / "bin" / "python"
    half_made.parent.mkdir(parents=True)
    half_made.symlink_to(sys.executable)
    with pytest.raises(ServiceError, match="from versions: none"):
        argilla_python(said.append)
    assert not [path for path in (tmp_path / "pairwright").iterdir() if path.is_dir()]


def start(home: Path, host: str = "127.0.0.1", port: int = 0) -> None:
    with running(home, host, port):
        pass


def small_dataset(client: Client, texts: list[str]) -> Dataset:
    name = f"small-{time.monotonic_ns()}"
    made = create_dataset(client, name, {"prompt": TEXT}, {"better": labels("first", "second")})
    made.add([{"fields": {"prompt": text}} for text in texts])
    return made


def answer(client: Client, record: str) -> None:
    values = {"better": {"value": "second"}}
    client("POST", f"/records/{record}/responses", {"status": "submitted", "values": values})


def responses(dataset: Dataset) -> list[dict[str, object]]:
    held = dataset.client("GET", f"/datasets/{dataset.id}/records", include="responses")
    return [response for record in held["items"] for response in record["responses"]]


def sign_in(address: Address) -> str:
    account = next(a for a in address.created if a.username == "annotator")
    form = {"username": account.username, "password": account.password}
    reply = httpx.post(f"{address.url}/api/v1/token", data=form, trust_env=False)
    return str(reply.raise_for_status().json()["access_token"])


def family() -> list[psutil.Process]:
    """All processes that this one has started and that still run."""
    return psutil.Process().children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def within(seconds: float, true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def serving(home: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`pairwright label serve` as a process of its own, with what it has printed so far."""
    command = [*SERVE, "--home", str(home), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        printed: list[str] = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("Ctrl-C"):
                break
        (url,) = (line.split()[1] for line in printed if line.startswith("Argilla: "))
        yield process, url, printed
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@contextmanager
def listening() -> Iterator[tuple[str, list[bytes]]]:
    """A page that keeps what is posted to it."""
    heard: list[bytes] = []

    class Ear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Ear) as page:
        thread = threading.Thread(target=page.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{page.server_port}", heard
        finally:
            page.shutdown()
            thread.join()


def test_who_can_read_the_folder_finds_the_server_and_a_key(
    environment: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    assert running_at(home) is None
    with running(home, port=0) as address:
        owner = next(a for a in address.created if a.role == "owner")
        assert running_at(home) == (address.url, owner.api_key)
    assert running_at(home) is None
    # As after a kill: the address is still there, and nobody holds the folder.
    (home / "address").write_text(address.url)
    assert running_at(home) is None
