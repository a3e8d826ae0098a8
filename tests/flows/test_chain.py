"""A chain of training for real: what a step hands on, and what kills, reruns and edits leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.chain import handed_on, train_in_turn
from flows.plan import make_plan, training_artifacts
from flows.progress import Progress
from flows.recipe import load_recipe
from preferences.records import Message
from preferences.store import Artifact, Manifest, Store
from tests.flows.test_pipeline import MINIATURE, PAIRWRIGHT, pairwright
from tests.flows.test_recipe_keys import carry_out
from tests.generation.tiny_model import write_model
from training.evaluation import OwnAnswer, Policy, log_ratios

TINY = {"dtype": "float32", "gradient_checkpointing": False, "probe": None, "max_steps": 1}
CHECK = f"{MINIATURE / 'world.py'}:reward"


def of_pairs(folder: Path, model: str, **changes: Any) -> dict[str, Any]:
    """A recipe of a few imported pairs, SFT before DPO."""
    rows = [
        {"prompt": f"Count to {n}.", "chosen": f"one to {n}", "rejected": "no"} for n in range(9)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"kind": "import", "name": "p", "source": "pairs.jsonl", "format": "preferences"}
    # Far enough to be seen in the answers' probabilities.
    start = {"method": "sft", "model": model, "learning_rate": 0.1, "batch_size": 2, **TINY}
    start |= {"max_steps": 2, "warmup_share": 0}
    return {
        "name": "pairs",
        "candidates": [pairs],
        "judges": [pairs],
        "split": {"test": 0.3},
        "steps": {"start": start},
        "alignment": {"method": "dpo", "model": "start", "batch_size": 2, **TINY},
        "runtime": {"store": str(folder / "store")},
        **changes,
    }


def models(store: Store) -> dict[str, Manifest]:
    return {m.name: m for m in store.manifests("alignment")}


@pytest.mark.timeout(480)
def test_the_alignment_starts_from_the_merged_model_of_its_step(
    tmp_path: Path, without_children: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(write_model(tmp_path / "base"))
    store = carry_out(tmp_path, of_pairs(tmp_path, base))
    loaded = load_recipe(tmp_path / "recipe.yaml")
    dataset = make_plan(loaded).dataset
    trained = training_artifacts(loaded, dataset)
    step, aligned = models(store)["pairs start"], models(store)["pairs aligned"]
    assert step.inputs == (str(dataset),)
    assert aligned.inputs == (str(dataset), str(trained["start"]))
    # The merged model says what the base with the step's adapter says, and not what the base says.
    merged = handed_on(loaded, store, trained, "start")
    assert merged == tmp_path / "store" / "merged" / step.fingerprint
    run = Path(store.folder(trained["alignment"]))
    assert json.loads((run / "config.json").read_text())["config"]["model"] == str(merged)
    said = [OwnAnswer((Message("user", "Count to 3."),), "one to 3", finished=True)]
    adapter = Path(store.folder(trained["start"])) / "adapter"
    whole, adapted = Policy(str(merged)), Policy(base, adapter=adapter)
    assert log_ratios(whole, adapted, said, "float32") == pytest.approx([0], abs=1e-3)
    (moved,) = log_ratios(whole, Policy(base), said, "float32")
    assert moved is not None
    assert abs(moved) > 0.1

    # On a machine that finds them in a bucket, the same is made of them.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket = Store("memory://chain")
    bucket.fs.put(f"{store.root}/artifacts", bucket.path("artifacts"), recursive=True)
    elsewhere = handed_on(loaded, bucket, trained, "start")
    assert elsewhere.is_relative_to(tmp_path / "cache")
    weights_of = [folder / "model.safetensors" for folder in (merged, elsewhere)]
    assert weights_of[0].read_bytes() == weights_of[1].read_bytes()

    # An edited alignment trains itself alone, and a merged model that is gone is made again.
    before = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
    for file in merged.iterdir():
        file.unlink()
    merged.rmdir()
    alignment = {"method": "dpo", "model": "start", "beta": 0.3, "batch_size": 2, **TINY}
    values = of_pairs(tmp_path, base, alignment=alignment)
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    edited = load_recipe(tmp_path / "edited.yaml")
    again = training_artifacts(edited, dataset)
    for name in again:
        train_in_turn(edited, store, dataset, again, name, Progress())
    assert (adapter / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert len(store.manifests("alignment")) == 3
    assert store.manifest(again["alignment"]) is not None
    assert (merged / "config.json").exists()


def chain(folder: Path, **alignment: Any) -> Path:
    """SFT, reward model and PPO on a few of the miniature's prompts, with answers by its policy."""
    few = {**TINY, "max_steps": 2, "batch_size": 4, "max_length": 256}
    policy = str(MINIATURE / "policy")
    sampling = {"max_tokens": 48}
    values: dict[str, Any] = {
        "name": "chain",
        "prompts": {"source": str(MINIATURE / "prompts.jsonl"), "limit": 12}
        | {"columns": {"prompt_id": "id"}},
        "candidates": [
            {"kind": "sample", "name": "policy", "engine": "transformers", "model": policy}
            | {"samples": 2, "sampling": sampling}
        ],
        "judges": [{"kind": "verifier", "name": "truth", "check": CHECK}],
        "pairs": {"min_probability": 0.5},
        "split": {"test": 0.3},
        "steps": {
            "start": {"method": "sft", "model": policy, **few},
            "judge": {"method": "reward", "model": "start", **few},
        },
        "alignment": {"method": "ppo", "model": "start", "reward_model": "judge", **few}
        | {"rollouts": 4, "max_tokens": 24, "reward_samples": 8, **alignment},
        "evaluation": {"engine": "transformers", "sampling": sampling}
        | {"checks": {"true_reward": CHECK}},
        "runtime": {"store": str(folder / "store")},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_chain_goes_on_where_it_was_and_an_edit_trains_its_own_step_alone(
    tmp_path: Path,
) -> None:
    path = chain(tmp_path)
    plan = make_plan(load_recipe(path))
    store = Store(tmp_path / "store")
    first, second = plan.steps
    killed = subprocess.Popen([*PAIRWRIGHT, "run", "recipe.yaml"], cwd=tmp_path)
    _wait(lambda: store.manifest(first) is not None)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert store.manifest(second) is None
    trained = weights(store, first)
    done = pairwright("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights(store, first) == trained
    for told in ("Training start, by sft", "Training judge, by reward", "KL from the first model"):
        assert told in done.stdout
    assert plan.alignment is not None
    aligned = store.manifest(plan.alignment)
    assert aligned is not None
    assert aligned.inputs == (str(plan.dataset), str(first), str(second))
    status = pairwright("status", "recipe.yaml", cwd=tmp_path).stdout
    assert status.count("done") == len(plan.artifacts) == 10
    again = pairwright("run", "recipe.yaml", cwd=tmp_path)
    assert "all is done already" in again.stderr
    merged = pairwright("merge", "recipe.yaml", "merged", "--dtype", "float32", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"`{first}`" in card

    chain(tmp_path, clip=0.1)
    edited = pairwright("align", "recipe.yaml", cwd=tmp_path)
    assert edited.returncode == 0, edited.stderr
    assert weights(store, first) == trained
    assert len(store.manifests("alignment")) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_vllm_samples_for_ppo_on_the_merged_model_of_a_step(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    path = chain(tmp_path, sampler="vllm", max_tokens=64)
    done = pairwright("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = make_plan(load_recipe(path))
    assert plan.alignment is not None
    aligned = Store(tmp_path / "store").manifest(plan.alignment)
    assert aligned is not None
    assert aligned.summary["steps"] == 2


def weights(store: Store, artifact: Artifact) -> tuple[int, bytes]:
    """When an adapter was written, and what it is."""
    file = Path(store.folder(artifact)) / "adapter" / "adapter_model.safetensors"
    return file.stat().st_mtime_ns, file.read_bytes()


def _wait(done: Any) -> None:
    deadline = time.monotonic() + 900
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_rounds_are_ordinary_recipes_and_a_repeated_command_does_nothing(
    tmp_path: Path,
) -> None:
    path = chain(tmp_path)
    policy = str(MINIATURE / "policy")
    values = yaml.safe_load(path.read_text())
    del values["steps"]
    values["alignment"] = {"method": "dpo", "model": policy, "learning_rate": 5e-4, "beta": 0.5}
    values["alignment"] |= {**TINY, "max_steps": 10, "batch_size": 8, "max_length": 256}
    values["rounds"] = {"most": 2, "max_kl": 100, "patience": 2}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    done = subprocess.run(
        [*PAIRWRIGHT, "iterate", "recipe.yaml", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    first, second = told["rounds"]
    # Few prompts decide by chance whether a round is a gain; what follows from it is no chance.
    gains = [one["number"] for one in (first, second) if one["win_rate"]["low"] > 0.5]
    assert told["kept"] == max(gains, default=0)
    assert Path(told["model"], "config.json").exists()
    merged = str(tmp_path / "store" / "merged" / first["model"].split("/")[1])
    start, revision = load_recipe(second["recipe"]).model_before()
    assert (start, revision) == (merged if 1 in gains else policy, None)
    assert first["dataset"] != second["dataset"]
    assert all(one["kl"]["clusters"] > 1 for one in (first, second))

    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()}
    again = pairwright("iterate", "recipe.yaml", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "all rounds are done already" in again.stderr
    assert told["reason"][:12] in " ".join(again.stdout.split())
    assert files == {p: p.stat().st_mtime_ns for p in files}
    # A round is an ordinary recipe.
    status = pairwright("status", second["recipe"], cwd=tmp_path).stdout
    assert status.count("done") == 8
    report = pairwright("report", second["recipe"], cwd=tmp_path).stdout
    assert "Dataset chain-round-2" in report
    answers = Store(tmp_path / "store").tables(Artifact(*second["dataset"].split("/")), "data/test")
    pair = next(iter(answers)).to_pylist()[0]
    trace = pairwright("trace", pair["chosen_id"][:12], second["recipe"], cwd=tmp_path).stdout
    assert f"Pair {pair['preference_id']}" in trace
