"""Killed a hundred times, does a build still make the same dataset, and what does a kill cost?

    python benchmarks/kill.py --kills 100

Answers and judgments come from an OpenAI-compatible server that runs here and replies by a hash of
the request. One build runs undisturbed. Others, each in a store of its own, are
killed with SIGKILL again and again until they are done: after an exponentially distributed number
of calls or of seconds, so that start, asking, writing and assembling are all hit. Their datasets
are compared with the first one byte for byte. The server counts the calls: those beyond what
undisturbed builds need were paid for twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from table import write_table

from flows import assembling, stages
from flows.plan import make_plan
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.run import Run
from preferences.store import Store

RECIPE = """
name: killed
prompts: {source: prompts.jsonl}
candidates: [{kind: sample, name: writer, engine: openai, model: writer, samples: 4}]
judges: [{kind: pairwise, name: judge, engine: openai, model: judge}]
split: {test: 0.1}
runtime: {shard_size: 50, engines: {writer: {base_url: "${url}"}, judge: {base_url: "${url}"}}}
"""
LATENCY_SECONDS = 0.004
LONGEST_SECONDS = 4.0
"""Mean time after which a child is killed that has not made its calls."""
KILLS_PER_BUILD = 40
"""Fewer than would leave the later stages untouched; when a build ends, another begins."""


class Endpoint(ThreadingHTTPServer):
    """A server that counts the calls it is asked to answer."""

    daemon_threads = True
    request_queue_size = 128
    calls = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection broke: somebody was killed."""


class Reply(BaseHTTPRequestHandler):
    """The reply to a request is a function of its bytes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Endpoint)
        if len(body) < int(self.headers["Content-Length"]):
            return  # Killed half-way through asking.
        self.server.calls += 1
        time.sleep(LATENCY_SECONDS)
        text = json.dumps(completion(json.loads(body), hashlib.sha256(body).digest())).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


def completion(request: dict[str, Any], digest: bytes) -> dict[str, Any]:
    """A chat completion: a verdict where log-probabilities are asked for, else a few words."""
    words = [f"word{byte}" for byte in digest]
    content, logprobs = " ".join(words[: 4 + digest[0] % 28]), None
    if request.get("logprobs"):
        first = (digest[0] + 1) / 258
        tokens = [
            {"token": token, "logprob": math.log(p), "bytes": None, "top_logprobs": []}
            for token, p in (("A", first), ("B", 1 - first))
        ]
        content = "A" if first > 0.5 else "B"
        logprobs = {"content": [{**tokens[content == "B"], "top_logprobs": tokens}]}
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}
    usage = {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
    head = {"id": digest.hex()[:8], "object": "chat.completion", "created": 0}
    return {**head, "model": request["model"], "choices": [choice], "usage": usage}


def build(folder: Path, store: str, url: str) -> None:
    """The stages without Prefect, which would take most of the time of so small a build."""
    plan = make_plan(load_recipe(folder / "recipe.yaml", {"url": url}))
    run = Run(plan, Store(folder / store), Progress())
    stages.make_prompts(run)
    stages.make_candidates(run, 0)
    stages.make_judgments(run, 0)
    stages.make_rankings(run)
    assembling.make_preferences(run)
    assembling.make_dataset(run, RECIPE)


def start(folder: Path, store: str, url: str) -> BaseProcess:
    """A build in a process of its own."""
    process = multiprocessing.get_context("forkserver").Process(
        target=build, args=(folder, store, url)
    )
    process.start()
    return process


def files(folder: Path) -> dict[str, str]:
    """Every file of a folder with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def claims(store: Store) -> Iterator[bool]:
    """Of each claim that was ever made, whether it is free."""
    for path in Path(store.path("claims")).glob("*.lock"):
        with store.claim(path.stem) as free:
            yield free


def main() -> None:
    """Build, build again under fire, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300, help="prompts")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    preload = ["__main__", "flows.stages", "generation.openai_engine", "table"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    endpoint = Endpoint(("127.0.0.1", 0), Reply)
    threading.Thread(target=endpoint.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"prompt": f"What is the use of {n}?"} for n in range(arguments.rows)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "recipe.yaml").write_text(RECIPE)
        undisturbed = start(folder, "undisturbed", url)
        undisturbed.join()
        assert undisturbed.exitcode == 0, undisturbed.exitcode
        needed, endpoint.calls = endpoint.calls, 0

        plan = make_plan(load_recipe(folder / "recipe.yaml", {"url": url}))
        expected = files(Path(Store(folder / "undisturbed").folder(plan.dataset)))
        started, builds, differing, held = time.perf_counter(), 0, 0, 0
        hit: Counter[str] = Counter()
        while hit.total() < arguments.kills:
            place = f"killed-{builds}"
            store = Store(folder / place)
            while hit.total() < arguments.kills:
                process, before = start(folder, place, url), endpoint.calls
                patience = draw.expovariate(KILLS_PER_BUILD / needed)
                deadline = time.perf_counter() + draw.expovariate(1 / LONGEST_SECONDS)
                while process.is_alive() and time.perf_counter() < deadline:
                    if endpoint.calls - before > patience:
                        break
                    time.sleep(0.001)
                process.kill()
                process.join()
                if process.exitcode == 0:
                    break  # It was done before its kill.
                assert process.exitcode == -signal.SIGKILL, process.exitcode
                owed = (a.stage for _, a in plan.artifacts if store.manifest(a) is None)
                calling = "asking" if endpoint.calls > before else "not asking"
                hit[f"{next(owed, 'nothing')} {calling}"] += 1
            last = start(folder, place, url)
            last.join()
            assert last.exitcode == 0, last.exitcode
            builds += 1
            differing += files(Path(store.folder(plan.dataset))) != expected
            held += sum(not free for free in claims(store))
        seconds = time.perf_counter() - started
        time.sleep(1)  # What the server had not read yet counts too.
        made, owed_calls = endpoint.calls, needed * builds
        stray = len(list(folder.rglob("*.tmp")))
    kills = hit.total()
    header = ["kills", "builds", "datasets identical", "calls needed", "calls made"]
    header += ["extra per kill", "claims left", "temporary files left", "seconds"]
    identical = f"{builds - differing} of {builds}"
    row = [str(kills), str(builds), identical, f"{owed_calls:,}", f"{made:,}"]
    row += [f"{(made - owed_calls) / kills:.1f}", str(held), str(stray), f"{seconds:.0f}"]
    stages_hit = ", ".join(f"{count} {stage}" for stage, count in sorted(hit.items()))
    note = (
        f"First unfinished stage at the kill: {stages_hit}. `asking`: the process had made calls. "
        "In flight at once: 16 calls, the engine's default `concurrency`."
    )
    write_table("kill", header, [row], note)


if __name__ == "__main__":
    main()
