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
from training.dpo import DPOConfig, train
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
        "from training.dpo import DPOConfig, train\n"
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
