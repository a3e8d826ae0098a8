"""A run interrupted anywhere ends as if it had not been, and its folder says which run it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import training
from preferences.errors import InputError
from tests.training.conftest import (
    THINGS,
    equal,
    pairs_preferring,
    saved_weights,
    silent,
    write_split,
)
from training.dpo import DPOConfig
from training.loop import train
from training.run import RunFolder, TrainingResult, TrainingRuntime

MakeConfig = Callable[..., DPOConfig]
ROOT = Path(training.__file__).parents[1]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, model: str, red_pairs: Path
) -> tuple[DPOConfig, Path, TrainingResult]:
    """A run from beginning to end, with dropout so that random state matters."""
    config = DPOConfig(**RESUMABLE, model=model)
    run = tmp_path_factory.mktemp("whole") / "run"
    return config, run, train(config, red_pairs, run, EVERY_FOUR, progress=silent)


EVERY_FOUR = TrainingRuntime(log_steps=4, save_steps=4)
RESUMABLE: dict[str, Any] = {
    "learning_rate": 2e-3,
    "batch_size": 2,
    "accumulation": 2,
    "max_steps": 16,
    "max_length": 48,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "eval_steps": 8,
    "lora": {"rank": 4, "dropout": 0.2},
    "probe": {"every": 3, "prompts": 6, "max_tokens": 10, "max_malformed": 1, "max_length_rate": 1},
}


def assert_same_run(run: Path, whole: Path, result: TrainingResult, expected: Any) -> None:
    assert result == expected
    assert equal(saved_weights(run, result), saved_weights(whole, expected))
    for journal in ("metrics.jsonl", "samples.jsonl", "result.json", "config.json"):
        assert (run / journal).read_bytes() == (whole / journal).read_bytes()


def test_a_killed_run_resumes_from_the_last_good_checkpoint_to_the_same_weights(
    whole: tuple[DPOConfig, Path, TrainingResult], red_pairs: Path, tmp_path: Path
) -> None:
    config, expected_run, expected = whole
    (tmp_path / "config.json").write_text(config.model_dump_json())
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from training.dpo import DPOConfig\n"
        "from training.loop import train\n"
        "from training.run import TrainingRuntime\n"
        "torch.set_num_threads(1)\n"
        "def die(step, steps, metrics):\n"
        "    if step == 11:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = DPOConfig.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "runtime = TrainingRuntime(log_steps=4, save_steps=4)\n"
        "train(config, Path(sys.argv[2]), Path(sys.argv[3]), runtime, progress=die)\n"
    )
    run = tmp_path / "run"
    arguments = [tmp_path / "config.json", red_pairs, run]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    newest = RunFolder(run).newest_checkpoint()
    assert newest is not None
    assert newest.step == 8
    # The newest checkpoint is torn, as if the kill had come while it was written.
    os.truncate(newest.folder / "optimizer.pt", 100)
    older = RunFolder(run).newest_checkpoint()
    assert older is not None
    assert older.step == 4
    result = train(config, red_pairs, run, EVERY_FOUR, progress=silent)
    assert_same_run(run, expected_run, result, expected)


class Stop(Exception):
    """Ctrl-C, a lost connection of the scorer, a full disk …"""


def test_an_exception_in_the_middle_costs_at_most_the_steps_since_the_checkpoint(
    whole: tuple[DPOConfig, Path, TrainingResult], red_pairs: Path, tmp_path: Path
) -> None:
    config, expected_run, expected = whole
    steps: list[int] = []

    def stop_once(step: int, steps_in_all: int, metrics: Mapping[str, float]) -> None:
        steps.append(step)
        if steps == list(range(1, 15)):
            raise Stop

    run = tmp_path / "run"
    with pytest.raises(Stop):
        train(config, red_pairs, run, EVERY_FOUR, progress=stop_once)
    result = train(config, red_pairs, run, EVERY_FOUR, progress=stop_once)
    assert steps == [*range(1, 15), *range(13, 17)]
    assert_same_run(run, expected_run, result, expected)
    # Finished: asking again trains nothing.
    assert train(config, red_pairs, run, EVERY_FOUR, progress=stop_once) == expected
    assert len(steps) == 18
    assert not list(run.glob("checkpoint-*"))


def test_a_run_whose_folders_were_moved_goes_on_and_one_with_other_weights_does_not(
    whole: tuple[DPOConfig, Path, TrainingResult], red_pairs: Path, tmp_path: Path
) -> None:
    config, expected_run, expected = whole

    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if step == 13:
            raise Stop

    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(config.model, old / "model")
    shutil.copytree(red_pairs, old / "pairs")
    before = config.model_copy(update={"model": str(old / "model")})
    with pytest.raises(Stop):
        train(before, old / "pairs", old / "run", EVERY_FOUR, progress=stop)
    old.rename(new)
    moved = config.model_copy(update={"model": str(new / "model")})
    steps: list[int] = []
    result = train(
        moved, new / "pairs", new / "run", EVERY_FOUR, progress=lambda step, *_: steps.append(step)
    )
    assert steps == [13, 14, 15, 16]
    assert result.fingerprint == expected.fingerprint
    assert equal(saved_weights(new / "run", result), saved_weights(expected_run, expected))

    (new / "model" / "generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(InputError, match=r"its model was .*old/model, of other content"):
        train(moved, new / "pairs", new / "run", EVERY_FOUR, progress=silent)


def test_an_empty_folder_that_the_store_made_is_taken(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "alignment").mkdir()
    config = make_config(max_steps=1, probe=None)
    assert train(config, red_pairs, tmp_path / "alignment", progress=silent).steps == 1


def test_a_folder_of_another_run_is_refused_with_what_differs(
    whole: tuple[DPOConfig, Path, TrainingResult], red_pairs: Path, tmp_path: Path
) -> None:
    config, run, _ = whole
    with pytest.raises(InputError, match=r"beta was 0.1 and is 0.2.*choose another folder"):
        train(config.model_copy(update={"beta": 0.2}), red_pairs, run)
    write_split(tmp_path, "train", pairs_preferring("blue", 4, THINGS))
    with pytest.raises(InputError, match="the dataset changed"):
        train(config, tmp_path, run)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(InputError, match=r"not a training run \(it has chapter1.tex"):
        train(config, red_pairs, tmp_path / "thesis")


def test_probing_does_not_change_what_is_trained(
    whole: tuple[DPOConfig, Path, TrainingResult], red_pairs: Path, tmp_path: Path
) -> None:
    config, probed, expected = whole
    blind = config.model_copy(update={"probe": None})
    result = train(blind, red_pairs, tmp_path / "run", EVERY_FOUR, progress=silent)
    assert equal(saved_weights(tmp_path / "run", result), saved_weights(probed, expected))
    assert len(expected.probes) == 1 + 6  # steps 0, 3, 6, 9, 12, 15, 16
    assert result.probes == ()


def test_the_saved_adapter_gives_the_held_out_answers_the_trained_log_probabilities(
    whole: tuple[DPOConfig, Path, TrainingResult], red_pairs: Path
) -> None:
    import peft

    from training.data import load_pairs
    from training.evaluation import answer_log_probs
    from training.models import load_model, load_tokenizer

    config, run, result = whole
    tokenizer = load_tokenizer(config.model, None)
    ends = {tokenizer.eos_token_id}
    pairs = load_pairs(red_pairs, "test", tokenizer, ends=ends, max_length=config.max_length)
    assert pairs is not None
    base = load_model(config.model, None, "lora", "float32")
    policy = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    rows = [(row["prompt_ids"], row["chosen_ids"]) for row in pairs.rows]
    sums = answer_log_probs(policy, rows, tokenizer.pad_token_id, batch_size=5)
    # Tight enough that training in another dtype than the one asked for shows.
    assert sum(sums) / len(sums) == pytest.approx(result.evaluation["eval_logps/chosen"], abs=1e-4)


def test_what_the_run_is_can_be_read_from_its_folder(
    whole: tuple[DPOConfig, Path, TrainingResult],
) -> None:
    config, run, result = whole
    stored = json.loads((run / "config.json").read_text())
    assert DPOConfig(**stored["config"]) == config
    assert stored["fingerprint"] == result.fingerprint
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12, 16]
    assert {"rewards/chosen", "rewards/margins", "logps/chosen"} <= lines[-2].keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw_8bit", "lora": {"rank": 64, "dropout": 0.2}},
        pytest.param(
            {"optimizer": "adafactor", "labels": "soft", "schedule": "cosine"},
            marks=pytest.mark.slow,
        ),
        {"weights": "full", "loss": "ipo", "weight_decay": 0.1},
    ],
    ids=["8 bits", "adafactor", "full weights"],
)
def test_whatever_the_settings_an_interrupted_run_ends_with_the_same_weights(
    changes: dict[str, Any], model: str, red_pairs: Path, tmp_path: Path
) -> None:
    config = DPOConfig(**{**RESUMABLE, "model": model, "probe": None, **changes})

    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if step == 10:
            raise Stop

    whole = train(config, red_pairs, tmp_path / "whole", EVERY_FOUR, progress=silent)
    with pytest.raises(Stop):
        train(config, red_pairs, tmp_path / "run", EVERY_FOUR, progress=stop)
    result = train(config, red_pairs, tmp_path / "run", EVERY_FOUR, progress=silent)
    assert_same_run(tmp_path / "run", tmp_path / "whole", result, whole)


def test_an_interrupted_run_that_stops_early_stops_at_the_same_step_with_the_same_weights(
    model: str, tmp_path: Path
) -> None:
    pairs = pairs_preferring("red red", 48, THINGS[:24])
    write_split(tmp_path / "d", "train", pairs)
    write_split(tmp_path / "d", "test", [(p, worse, red) for p, red, worse in pairs[:24]])
    changes = {"eval_steps": 2, "max_steps": 40, "early_stopping": {"patience": 3}, "probe": None}
    config = DPOConfig(**{**RESUMABLE, "model": model, **changes})

    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if step == 7:
            raise Stop

    whole = train(config, tmp_path / "d", tmp_path / "whole", EVERY_FOUR, progress=silent)
    # Held-out pairs ask for the opposite: step 2 is the best, and 4, 6 and 8 are no better.
    assert (whole.steps, whole.saved_step, whole.stopped_early) == (8, 2, True)
    with pytest.raises(Stop):
        train(config, tmp_path / "d", tmp_path / "run", EVERY_FOUR, progress=stop)
    result = train(config, tmp_path / "d", tmp_path / "run", EVERY_FOUR, progress=silent)
    assert_same_run(tmp_path / "run", tmp_path / "whole", result, whole)


def test_a_checkpoint_of_another_run_is_not_gone_on_from(
    model: str, red_pairs: Path, tmp_path: Path
) -> None:
    def stop(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if step == 6:
            raise Stop

    for name, beta in (("ours", 0.1), ("theirs", 0.2)):
        config = DPOConfig(**{**RESUMABLE, "model": model, "beta": beta, "probe": None})
        with pytest.raises(Stop):
            train(config, red_pairs, tmp_path / name, EVERY_FOUR, progress=stop)
    shutil.copytree(tmp_path / "ours" / "checkpoint-4", tmp_path / "theirs" / "checkpoint-5")
    with pytest.raises(InputError, match=r"checkpoint-5: a checkpoint of another run.*delete it"):
        train(config, red_pairs, tmp_path / "theirs", EVERY_FOUR, progress=silent)
    shutil.rmtree(tmp_path / "theirs" / "checkpoint-5")
    assert train(config, red_pairs, tmp_path / "theirs", EVERY_FOUR, progress=silent).steps == 16


def test_a_second_run_on_the_same_base_and_pairs_does_not_ask_the_reference_again(
    model: str, red_pairs: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    asked: list[str] = []
    real = DPOTrainer._precompute_ref_logps

    def ask(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        asked.append(name)
        return real(self, dataset, name, batch_size)

    monkeypatch.setattr(DPOTrainer, "_precompute_ref_logps", ask)
    settings = {**RESUMABLE, "model": model, "weights": "full", "max_steps": 2, "probe": None}
    config = DPOConfig(**settings)

    def run(name: str, config: DPOConfig = config) -> dict[str, Any]:
        result = train(config, red_pairs, tmp_path / name, EVERY_FOUR, progress=silent)
        return saved_weights(tmp_path / name, result)

    first = run("first")
    assert asked == ["train", "eval"]
    again = run("again")
    run("dearer", config.model_copy(update={"beta": 0.5}))
    assert asked == ["train", "eval"]
    assert equal(first, again)
    # Torn by a crash, or from a dataset with other rows: asked again, to the same end.
    files = sorted((own_cache / "pairwright" / "reference").iterdir())
    assert len(files) == 2
    os.truncate(files[0], files[0].stat().st_size // 2)
    files[1].write_text('{"columns": {"ref_chosen_logps": [1.0], "ref_rejected_logps": [1.0]}}')
    assert equal(first, run("torn"))
    assert asked == ["train", "eval", "train", "eval"]
    # Another base is another reference.
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"] += 0.1
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    run("other", config.model_copy(update={"model": str(tmp_path / "base")}))
    assert asked == ["train", "eval"] * 3
