"""Recipes on a schedule: what is deployed, and the one command that serves it.

A deployment is a small file in the store. `pairwright up` starts a Prefect server (unless
PREFECT_API_URL names one), serves every deployment and gives each dataset that is finished to its
alignment. Events can be lost, so a reconciler looks every so often for what they missed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from flows import prefect_settings
from flows.labels import ARGILLA, ARGILLA_URL, argilla_home, plan_with_answers
from flows.recipe import load_recipe
from flows.rounds import next_round, rounds_of
from flows.webhook import told_of_answers
from judging.argilla.api import connect
from judging.argilla.server import running, running_at, told_once
from preferences.errors import InputError, ServiceError
from preferences.store import Store

START_SECONDS = 180.0
_SERVER = (sys.executable, "-m", "prefect", "server", "start")
RECONCILE = "*/10 * * * *"
"""When to look for finished datasets whose event was lost."""
POLL = "*/5 * * * *"
"""When to ask whether people are done."""


@dataclass(frozen=True)
class Deployment:
    """A recipe that is served."""

    recipe: str
    settings: dict[str, str]
    cron: str | None
    store: str


def record_deployment(
    recipe: Path, cron: str | None, settings: Mapping[str, str], store: str | None
) -> str:
    """Check the recipe and keep it to be served; returns what was done, for people."""
    loaded = load_recipe(recipe, settings)
    place = Store(store or loaded.runtime.store)
    plan_with_answers(loaded, place)
    if loaded.rounds is not None:
        rounds_of(loaded, None)
    if cron is not None:
        _check_cron(cron)
    url = str(Path(place.url).resolve()) if place.is_local else place.url
    deployment = Deployment(str(recipe.resolve()), dict(settings), cron, url)
    place.write_text(
        place.path("deployments", f"{loaded.name}.json"), json.dumps(asdict(deployment), indent=1)
    )
    when = f"on schedule {cron!r}" if cron else "on demand"
    what = "to build" if loaded.rounds is None else "to go round"
    return f"{loaded.name}: deployed, {what} {when}; `pairwright up` serves it"


def deployments(place: Store) -> list[tuple[str, Deployment]]:
    """The recorded deployments with their names."""
    found = []
    for path in sorted(place.fs.glob(place.path("deployments", "*.json"))):
        text = place.read_text(path)
        if text is not None:
            found.append((Path(path).stem, Deployment(**json.loads(text))))
    return found


def current_recipe(deployment: Deployment) -> tuple[str, dict[str, str]]:
    """The recipe that is worked on, which a round has of its own, and what is set in it."""
    recipe = load_recipe(deployment.recipe, deployment.settings)
    if recipe.rounds is not None:
        path = next_round(recipe, Store(deployment.store))
        if path is not None:
            return str(path), {}
    return deployment.recipe, deployment.settings


def serve_all(store: str, host: str, port: int, argilla_port: int) -> None:
    """Serve every deployment of a store until Ctrl-C; then nothing of it is left running.

    Where a recipe has people label in Argilla, the store's own server is started with it, unless
    another is named.
    """
    place = Store(store)
    recorded = deployments(place)
    if not recorded:
        raise InputError(f"{store}: nothing is deployed; `pairwright deploy RECIPE` first")
    prefect_settings.apply()
    os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"
    signal.signal(signal.SIGTERM, _as_interrupt)
    labels_here = any(_labels_here(deployment) for _, deployment in recorded)
    with ExitStack() as stack:
        if labels_here:
            stack.enter_context(_argilla(place, host, argilla_port))
        url = stack.enter_context(_server(place, host, port))
        print(f"Prefect: {url.removesuffix('/api')}", flush=True)
        if labels_here and (found := running_at(argilla_home(place))) is not None:
            stack.enter_context(told_of_answers(connect(*found), _poll_now))
        signal.signal(signal.SIGINT, _leave)
        _serve(recorded, store)


def _labels_here(deployment: Deployment) -> bool:
    """Whether people label in the store's own Argilla."""
    recipe = load_recipe(deployment.recipe, deployment.settings)
    elsewhere = os.environ.get(ARGILLA_URL) or recipe.runtime.argilla_url
    return recipe.people is not None and recipe.people.labels == ARGILLA and not elsewhere


@contextmanager
def _argilla(place: Store, host: str, port: int) -> Iterator[None]:
    def say(line: str) -> None:
        print(line, flush=True)

    with running(argilla_home(place), host, port, say) as address:
        say(f"Argilla: {address.url}")
        if address.created:
            say(told_once(address.created))
        yield


def _poll_now() -> None:
    from prefect.deployments import run_deployment

    run_deployment("poll-labels/all", timeout=0)


def served(recorded: Sequence[tuple[str, Deployment]], store: str) -> list[Any]:
    """Prefect's deployments: of every recipe its build and its alignment, or its rounds; and what
    looks after all of them."""
    from prefect.types.entrypoint import EntrypointType

    from flows.align import align
    from flows.build import build
    from flows.events import on_finished_dataset, on_finished_labels
    from flows.iterate import iterate
    from flows.poll import poll_labels
    from flows.reconcile import reconcile

    common: dict[str, Any] = {
        "concurrency_limit": 1,
        "entrypoint_type": EntrypointType.MODULE_PATH,
    }
    found: list[Any] = []
    for name, deployment in recorded:
        common["parameters"] = {
            "recipe": deployment.recipe,
            "settings": deployment.settings,
            "store": deployment.store,
        }
        recipe = load_recipe(deployment.recipe, deployment.settings)
        answered = [on_finished_labels(name)] if recipe.people else []
        first: Any = build if recipe.rounds is None else iterate
        found.append(first.to_deployment(name, cron=deployment.cron, triggers=answered, **common))
        if recipe.alignment is not None and recipe.rounds is None:
            found.append(align.to_deployment(name, triggers=[on_finished_dataset(name)], **common))
    common["parameters"] = {"store": store}
    for watch, cron in ((reconcile, RECONCILE), (poll_labels, POLL)):
        found.append(watch.to_deployment("all", cron=cron, **common))
    return found


def _serve(recorded: list[tuple[str, Deployment]], store: str) -> None:
    from prefect.runner import Runner

    for name, deployment in recorded:
        print(f"Serving {name}: {deployment.cron or 'on demand'}", flush=True)
    print("Ctrl-C stops everything.", flush=True)

    class Obedient(Runner):
        """Stops on SIGTERM as on Ctrl-C; Prefect's own farewell ends in a traceback."""

        def handle_sigterm(self, *args: Any, **kwargs: Any) -> None:
            signal.raise_signal(signal.SIGINT)

    runner = Obedient(pause_on_shutdown=False)
    for each in served(recorded, store):
        runner.add_deployment(each)
    asyncio.run(runner.start())


@contextmanager
def _server(place: Store, host: str, port: int) -> Iterator[str]:
    """A Prefect server as our own child, or the one that PREFECT_API_URL names."""
    given = os.environ.get("PREFECT_API_URL")
    if given:
        yield given
        return
    _require_free(host, port)
    home = Path(place.root if place.is_local else ".pairwright") / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(home.resolve()))
    url = f"http://{host}:{port}/api"
    os.environ["PREFECT_API_URL"] = url
    # The UI asks for its API where the browser sees it.
    environment = {**os.environ, "PREFECT_UI_API_URL": url}
    with (home / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [*_SERVER, "--host", host, "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is ours to pass on, after the flows have stopped.
        )
    try:
        print("Starting the Prefect server …", flush=True)
        _await_healthy(server, url, home / "server.log")
        yield url
    finally:
        _stop(server)


def _await_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise ServiceError(f"the Prefect server ended at once ({''.join(last)}); see {log}")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise ServiceError(f"the Prefect server did not answer in {START_SECONDS:.0f} s; see {log}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Ask, then insist; the server is a process group of its own."""
    for how, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        try:
            os.killpg(server.pid, how)
            server.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port {port} on {host} is taken ({error.strerror}); stop what uses it, or choose "
                "another with --port"
            ) from error


def _check_cron(cron: str) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError as error:
        raise InputError(f"--cron {cron!r}: not a schedule; five fields, as '0 3 * * *'") from error


def _leave(signum: int, frame: FrameType | None) -> None:
    """End at once with all children. Every stage goes on where it stopped."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    print("Stopped.", flush=True)
    os._exit(0)


def _as_interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
