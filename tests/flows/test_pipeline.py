"""The main job on the miniature: real Prefect, real vLLM, a real judge, real DPO."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "recipes" / "miniature"
PAIRWRIGHT = [sys.executable, "-c", "from flows.cli import main; main()"]


def pairwright(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Call the command line in a process of its own."""
    return subprocess.run(
        [*PAIRWRIGHT, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"COLUMNS": "200"},
    )


def small_miniature(folder: Path) -> Path:
    """The miniature with fewer prompts and steps, its files by absolute path."""
    values: dict[str, Any] = yaml.safe_load((MINIATURE / "recipe.yaml").read_text())
    values["prompts"] |= {"source": str(MINIATURE / "prompts.jsonl"), "limit": 30}
    values["candidates"][0] |= {"model": str(MINIATURE / "policy"), "samples": 3}
    values["judges"][0] |= {
        "model": str(MINIATURE / "judge"),
        "rubric": str(MINIATURE / "rubric.md"),
    }
    values["pairs"]["min_probability"] = 0.6
    values["split"]["test"] = 0.2
    values["alignment"] |= {"model": str(MINIATURE / "policy"), "max_steps": 4, "batch_size": 8}
    values["alignment"]["probe"] |= {"every": 2, "prompts": 4}
    values["evaluation"]["prompts"]["source"] = str(MINIATURE / "test_prompts.jsonl")
    values["evaluation"]["prompts"]["limit"] = 20
    # vLLM takes half a minute to start; it answers and judges before this.
    values["evaluation"]["engine"] = "transformers"
    values["evaluation"]["checks"] = {
        name: f"{MINIATURE / 'world.py'}:{function}"
        for name, function in (("true_reward", "reward"), ("well_formed", "well_formed"))
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The small miniature carried out once; the folder and what was printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    run = pairwright("run", small_miniature(folder), cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout + run.stderr


@pytest.mark.timeout(600)
def test_the_miniature_runs_from_prompts_to_an_evaluated_model(done: tuple[Path, str]) -> None:
    _, printed = done
    assert "Traceback" not in printed
    assert "Before and after, 20 prompts" in printed
    assert "true reward" in printed
    assert "win rate at equal lengths" in printed
    # 30 prompts x 3 answers. 24 prompts are the pilot, with 3 pairs in both orders each: 24 x 6;
    # of the other 6, the best and the worst at least meet in both orders.
    assert "candidates: policy: 90 rows" in printed
    asked = re.search(r"judgments: judge: (\d+) rows", printed)
    assert asked is not None
    assert 24 * 6 + 6 * 2 <= int(asked[1]) < 30 * 6


def test_a_second_run_does_nothing_at_once(done: tuple[Path, str]) -> None:
    folder, _ = done
    before = sorted((p, p.stat().st_mtime_ns) for p in (folder / "store").rglob("*.parquet"))
    again = pairwright("run", "recipe.yaml", cwd=folder)
    assert again.returncode == 0
    assert "all is done already" in again.stderr
    after = sorted((p, p.stat().st_mtime_ns) for p in (folder / "store").rglob("*.parquet"))
    assert before == after


def test_the_store_loses_no_answer_and_flips_none(done: tuple[Path, str]) -> None:
    import pyarrow.parquet as pq

    folder, _ = done
    artifacts = folder / "store" / "artifacts"

    def rows(pattern: str) -> list[dict[str, Any]]:
        return [
            row for p in sorted(artifacts.glob(pattern)) for row in pq.read_table(p).to_pylist()
        ]

    answers = {row["candidate_id"]: row for row in rows("candidates/*/part-*.parquet")}
    said: dict[tuple[str, str], float] = {}
    for row in rows("judgments/*/part-*.parquet"):
        said[tuple(row["candidate_ids"])] = row["probability"]
    pairs = rows("dataset/*/data/*.parquet")
    assert len(answers) == 90
    assert len(said) >= 24 * 6 + 6 * 2
    assert pairs
    for pair in pairs:
        assert pair["chosen"][0]["content"] == answers[pair["chosen_id"]]["response"]
        assert pair["rejected"][0]["content"] == answers[pair["rejected_id"]]["response"]
        prompts = {answers[pair[side]]["prompt_id"] for side in ("chosen_id", "rejected_id")}
        assert prompts == {pair["prompt_id"]}
    # With all three answers compared, the direct verdicts can be overruled, but seldom are.
    direct = [
        said[p["chosen_id"], p["rejected_id"]] + 1 - said[p["rejected_id"], p["chosen_id"]]
        for p in pairs
        if {(p["chosen_id"], p["rejected_id"]), (p["rejected_id"], p["chosen_id"])} <= said.keys()
    ]
    assert len(direct) > 20
    assert sum(d > 1 for d in direct) / len(direct) > 0.9


def test_status_trace_and_exports_show_what_is_there(done: tuple[Path, str]) -> None:
    import datasets

    folder, _ = done
    status = pairwright("status", "recipe.yaml", cwd=folder).stdout
    assert status.count("done") == 8
    candidate = next((folder / "store" / "artifacts" / "dataset").glob("*/data/train-*.parquet"))
    pair = datasets.Dataset.from_parquet(str(candidate), cache_dir=str(folder / "cache"))[0]
    trace = pairwright("trace", pair["chosen_id"][:12], "recipe.yaml", cwd=folder).stdout
    assert pair["prompt"][0]["content"] in trace
    assert f"Pair {pair['preference_id']}" in trace
    assert trace.count("P(first better)") >= 2
    for form, columns in {
        "conversational": {"prompt", "chosen", "rejected"},
        "plain": {"prompt", "chosen", "rejected"},
        "kto": {"prompt", "completion", "label"},
        "ranking": {"prompt", "completions", "scores"},
    }.items():
        done_ = pairwright("export", "recipe.yaml", form, "--format", form, cwd=folder)
        assert done_.returncode == 0, done_.stderr
        loaded = datasets.load_dataset(str(folder / form), cache_dir=str(folder / "cache"))
        assert columns <= set(loaded["train"].column_names)
    again = pairwright("export", "recipe.yaml", "plain", "--format", "plain", cwd=folder)
    assert again.returncode == 2
    assert "already exists" in again.stderr


def test_the_trained_model_becomes_one_folder_with_its_card(done: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = done
    merged = pairwright("merge", "recipe.yaml", "merged", "--dtype", "float32", cwd=folder)
    assert merged.returncode == 0, merged.stderr
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(MINIATURE / "policy")
    assert model.num_parameters() == base.num_parameters()
    assert any((a != b).any() for a, b in zip(model.parameters(), base.parameters(), strict=True))
    card = (folder / "merged" / "README.md").read_text()
    for told in ("true_reward", "win rate", "dpo", "name: miniature"):
        assert told in card
    wrong = pairwright("merge", "recipe.yaml", "other", "--dtype", "int8", cwd=folder)
    assert (wrong.returncode, "say float32 or bfloat16" in wrong.stderr) == (2, True)


@pytest.mark.timeout(300)
def test_up_serves_a_deployed_recipe_and_a_finished_dataset_starts_its_alignment(
    tmp_path: Path,
) -> None:
    rows = [
        {"prompt": f"How do I clean the chair, {n}?", "response": text, "model": model}
        for n in range(30)
        for model, text in (("strong", f"First wipe the chair, {n}."), ("weak", f"no, {n}"))
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "served",
        "candidates": [{"kind": "import", "name": "answers", "source": "answers.jsonl"}],
        "judges": [{"kind": "prior", "name": "order", "order": ["strong", "weak"]}],
        "alignment": {
            "method": "dpo",
            "model": str(MINIATURE / "policy"),
            "max_steps": 1,
            "dtype": "float32",
            "probe": None,
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    deployed = pairwright("deploy", "recipe.yaml", "--cron", "0 3 * * *", cwd=tmp_path)
    assert deployed.returncode == 0, deployed.stderr
    wrong = pairwright("deploy", "recipe.yaml", "--cron", "every day", cwd=tmp_path)
    assert wrong.returncode == 2
    port = "4977"
    # A server of its own: what an earlier one still has to run would be run here.
    own = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [*PAIRWRIGHT, "up", "--port", port], cwd=tmp_path, stdout=log, stderr=log, env=own
        )
    try:
        api = f"http://127.0.0.1:{port}/api"
        found = _until(lambda: httpx.get(f"{api}/deployments/name/build/served"), 120)
        taken = pairwright("up", "--port", port, cwd=tmp_path)
        assert taken.returncode == 2
        assert f"port {port}" in taken.stderr
        # The trigger of the alignment is made after the deployment that it starts.
        _until(lambda: httpx.get(f"{api}/deployments/name/reconcile/all"), 60)
        # A server that is busy answers 503 and wants to be asked again, as Prefect's client does.
        start = f"{api}/deployments/{found.json()['id']}/create_flow_run"
        _until(lambda: httpx.post(start, json={"idempotency_key": "first"}), 60)
        models = tmp_path / "store" / "artifacts" / "alignment"
        deadline = time.monotonic() + 150
        while not list(models.glob("*/manifest.json")) and time.monotonic() < deadline:
            time.sleep(1)
        assert list(models.glob("*/adapter/adapter_model.safetensors")), _tail(tmp_path)
        runs = _until(lambda: httpx.post(f"{api}/flow_runs/filter", json={}), 60).json()
        assert {"build served", "align served"} <= {run["name"] for run in runs}
        logs = _until(lambda: httpx.post(f"{api}/logs/filter", json={}), 60).json()
        assert "✓ served: 30 rows" in {line["message"] for line in logs}
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(60)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{api}/health", timeout=2)
    assert "Traceback" not in _tail(tmp_path)


def _until(ask: Any, seconds: float) -> httpx.Response:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            answer: httpx.Response = ask()
            if answer.is_success:
                return answer
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise TimeoutError


def _tail(folder: Path) -> str:
    return (folder / "up.log").read_text(errors="replace")[-4000:]
