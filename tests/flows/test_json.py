"""`--json`: documents on stdout for programs, progress on stderr, and nothing else on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from tests.flows.asking import KEY, Models, carry_out, serving, write_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a recipe whose dataset is built, in `store` beside it."""
    folder = tmp_path_factory.mktemp("json")
    with pytest.MonkeyPatch.context() as patch, serving(Models()) as endpoint:
        patch.setenv("OPENAI_API_KEY", KEY)
        carry_out(write_recipe(folder, endpoint.url), folder / "store")
        yield folder


@pytest.fixture
def pairwright(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Calls the command line on the recipe; returns stdout and stderr."""

    def call(command: str, *options: str, store: str = "store") -> tuple[str, str]:
        where = ["--store", str(built / store)]
        arguments = [command, str(built / "recipe.yaml"), *where, *options]
        monkeypatch.setattr("sys.argv", ["pairwright", *arguments])
        with suppress(SystemExit):
            main()
        printed = capsys.readouterr()
        return printed.out, printed.err

    return call


def test_the_status_is_one_document_of_what_is_done_and_owed(pairwright: Any) -> None:
    out, err = pairwright("status", "--json")
    assert err == ""
    status = json.loads(out)
    assert status["recipe"] == "asking"
    states = {s["name"]: s["state"] for s in status["stages"]}
    assert states == {
        "prompts": "done",
        "candidates: policy": "done",
        "judgments: judge": "done",
        "rankings": "done",
        "preferences": "done",
        "dataset": "done",
    }
    rows = {s["name"]: s["rows"] for s in status["stages"]}
    # 40 prompts, 2 answers each, one pair of them in both orders.
    assert rows["prompts"] == 40
    assert rows["candidates: policy"] == 80
    assert rows["judgments: judge"] == 80


def test_the_status_of_an_empty_store_owes_everything(pairwright: Any) -> None:
    out, _ = pairwright("status", "--json", store="nowhere")
    stages = json.loads(out)["stages"]
    assert {s["state"] for s in stages} == {"owed"}
    assert {s["rows"] for s in stages} == {None}


def test_the_report_is_one_document_with_the_figures_of_every_stage(pairwright: Any) -> None:
    out, err = pairwright("report", "--json")
    assert err == ""
    report = json.loads(out)
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages["judgments: judge"]["summary"]["judge"]["judgments"] == 80
    train, test = (stages["dataset"]["summary"][side]["rows"] for side in ("train", "test"))
    assert train + test == stages["dataset"]["rows"]
    assert json.loads(pairwright("report", "--json", store="nowhere")[0])["stages"] == []


def test_a_run_with_nothing_to_do_prints_the_same_document(pairwright: Any) -> None:
    out, err = pairwright("run", "--json")
    assert json.loads(out) == json.loads(pairwright("report", "--json")[0])
    assert all(json.loads(line) for line in err.splitlines())
    assert pairwright("run", "--json", "--no-report")[0] == ""


def test_progress_is_one_object_a_line() -> None:
    import io

    from flows.progress import Progress
    from generation.engine import Completion

    stream = io.StringIO()
    progress = Progress("json", stream)
    with progress.stage("a\nstage \ud83d", 2, "answers") as advance:
        advance.reply(Completion("r", "text", "stop", cost=0.5), was_recorded=False)
        advance.by(1)
    progress.say("for people")
    (event,) = map(json.loads, stream.getvalue().splitlines())
    assert event["event"] == "stage"
    assert event["done"] == 2


@pytest.mark.slow
def test_a_whole_run_prints_one_document_and_its_progress_on_stderr(tmp_path: Path) -> None:
    with serving(Models()) as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url)
        run = subprocess.run(
            [sys.executable, "-c", "from flows.cli import main; main()", "run", "--json", recipe],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OPENAI_API_KEY": KEY, "PYTHONPATH": str(ROOT)},
        )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert [stage["name"] for stage in report["stages"]][-1] == "dataset"
    events = [json.loads(line) for line in run.stderr.splitlines()]
    assert {event["event"] for event in events} == {"stage", "finished"}
    assert [event["name"] for event in events if event["event"] == "finished"] == [
        stage["name"] if stage["name"] != "dataset" else "asking" for stage in report["stages"]
    ]


@pytest.mark.slow
def test_a_run_that_fails_says_so_in_one_line_and_exits_1(tmp_path: Path) -> None:
    models = Models()
    models.down = lambda body: body["model"] == "judge"
    with serving(models) as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url)
        run = subprocess.run(
            [sys.executable, "-c", "from flows.cli import main; main()", "run", "--json", recipe],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OPENAI_API_KEY": KEY, "PYTHONPATH": str(ROOT)},
        )
    assert run.returncode == 1
    assert run.stdout == ""
    *events, complaint = run.stderr.splitlines()
    assert all(json.loads(line)["event"] for line in events), run.stderr
    assert complaint.startswith("pairwright: judgments: 4 of 4 shards failed")
    assert "503 down" in complaint
