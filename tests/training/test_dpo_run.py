"""Whole runs on the tiny model: they learn what the pairs say and stop when they decay."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import training
from preferences.errors import InputError, ServiceError
from preferences.records import Messages
from tests.training.conftest import (
    THINGS,
    equal,
    pairs_preferring,
    saved_weights,
    silent,
    write_split,
)
from training.adapters import LoraConfig
from training.dpo import DPOConfig
from training.loop import train
from training.probe import ProbeConfig
from training.run import RunFolder, TrainingRuntime

MakeConfig = Callable[..., DPOConfig]
ROOT = Path(training.__file__).parents[1]


LEARNS = {"weights": "full", "learning_rate": 5e-4, "max_steps": 24}


def test_pairs_that_prefer_red_make_the_policy_say_red(
    make_config: MakeConfig,
    red_pairs: Path,
    runtime: TrainingRuntime,
    red_judge: Any,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    result = train(make_config(**LEARNS), red_pairs, run, runtime, red_judge, progress=silent)
    last = result.probes[-1]
    assert last.win_rate is not None
    assert last.win_rate > 0.65
    assert (result.saved, result.saved_step, result.steps) == ("model", 24, 24)
    assert not result.stopped_early
    assert result.evaluation["eval_rewards/accuracies"] > 0.9
    # The weights on disk are the trained ones and load as an ordinary model.
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(run / "model")
    assert equal(
        {k: v for k, v in policy.state_dict().items() if k in saved_weights(run, result)},
        saved_weights(run, result),
    )


def test_the_same_pairs_the_other_way_round_make_it_avoid_red(
    make_config: MakeConfig, runtime: TrainingRuntime, red_judge: Any, tmp_path: Path
) -> None:
    # Were a label flipped on the way, this and the test before could not both hold.
    for split, number, things in (("train", 48, THINGS[:24]), ("test", 24, THINGS[24:])):
        pairs = pairs_preferring("red red", number, things)
        write_split(tmp_path / "d", split, [(p, worse, red) for p, red, worse in pairs])
    config = make_config(**LEARNS)
    result = train(config, tmp_path / "d", tmp_path / "run", runtime, red_judge, progress=silent)
    last = result.probes[-1]
    assert last.win_rate is not None
    assert last.win_rate < 0.45


def test_a_collapse_is_stopped_and_the_best_probe_is_kept(
    make_config: MakeConfig, red_pairs: Path, runtime: TrainingRuntime, tmp_path: Path
) -> None:
    probe = ProbeConfig(every=1, prompts=12, max_tokens=12, max_malformed=0.4, patience=2)
    config = make_config(learning_rate=0.3, warmup_share=0.5, max_steps=200, probe=probe)
    run = tmp_path / "run"
    result = train(config, red_pairs, run, runtime, progress=silent)
    assert result.stopped_early
    assert result.steps < 60
    assert [p.breach is not None for p in result.probes[-2:]] == [True, True]
    assert result.best_step == result.saved_step < result.steps
    assert result.reason is not None
    assert result.reason.startswith(f"Stopped after step {result.steps} of 200, where ")
    assert "malformed" in result.reason
    # A collapse does not show where people look for it.
    assert result.metrics["rewards/accuracies"] >= 0.5
    assert result.metrics["rewards/margins"] > 1
    # What is saved answers as the best probe did.
    from training.evaluation import implicit_reward_accuracy

    assert implicit_reward_accuracy(config, run, red_pairs).pairs == 24


def test_a_policy_that_only_loses_is_given_back_as_the_reference(
    make_config: MakeConfig, red_pairs: Path, runtime: TrainingRuntime, tmp_path: Path
) -> None:
    def never(
        prompts: Sequence[Messages], responses: Sequence[str], references: Sequence[str]
    ) -> list[float | None]:
        return [0.0] * len(prompts)

    probe = ProbeConfig(every=2, prompts=4, max_tokens=12, max_malformed=0.9, max_length_rate=0.9)
    run = tmp_path / "run"
    config = make_config(probe=probe)
    result = train(config, red_pairs, run, runtime, never, progress=silent)
    assert (result.stopped_early, result.steps, result.saved_step) == (True, 4, 0)
    assert result.reason == (
        "Stopped after step 4 of 16, where they win 0% against the reference (at least 35%); "
        "the saved weights are those of the reference itself."
    )
    weights = saved_weights(run, result)
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_a_model_that_breaks_the_thresholds_itself_is_not_trained(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_config(probe=ProbeConfig(max_tokens=2, prompts=12))
    with pytest.raises(InputError, match=r"before any training: .*raise probe.max_tokens"):
        train(config, red_pairs, tmp_path / "run", progress=silent)


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoints(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    config = make_config(learning_rate=1e25, probe=None)
    run, each = tmp_path / "run", TrainingRuntime(log_steps=1, save_steps=1)
    with pytest.raises(ServiceError, match=r"step \d+: the loss or its gradient is not a finite"):
        train(config, red_pairs, run, each, progress=silent)
    newest = RunFolder(run).newest_checkpoint()
    assert newest is not None
    weights = load_file(newest.folder / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    # The folder is a run still: it resumes, and says the same.
    with pytest.raises(ServiceError, match="lower learning_rate"):
        train(config, red_pairs, run, each, progress=silent)


def test_a_run_on_four_bit_weights_learns_and_loads_again(
    make_config: MakeConfig, red_pairs: Path, runtime: TrainingRuntime, tmp_path: Path
) -> None:
    from training.evaluation import implicit_reward_accuracy

    config = make_config(weights="qlora", gradient_checkpointing=True, lora=LoraConfig(rank=4))
    result = train(config, red_pairs, tmp_path / "run", runtime, progress=silent)
    accuracy = implicit_reward_accuracy(config, tmp_path / "run", red_pairs)
    # The evaluation is written apart from the trainer and reads the saved adapter.
    assert accuracy.accuracy.mean == pytest.approx(result.evaluation["eval_rewards/accuracies"])
    assert accuracy.accuracy.mean > 0.8


def test_bfloat16_trains_full_weights_held_in_float32_and_saves_bfloat16(
    make_config: MakeConfig, red_pairs: Path, runtime: TrainingRuntime, tmp_path: Path
) -> None:
    import torch

    config = make_config(weights="full", dtype="bfloat16", max_steps=2, learning_rate=1e-4)
    result = train(config, red_pairs, tmp_path / "run", runtime, progress=silent)
    weights = saved_weights(tmp_path / "run", result)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_the_console_gets_one_readable_line_per_log_and_no_warnings(
    make_config: MakeConfig,
    red_pairs: Path,
    runtime: TrainingRuntime,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    train(make_config(max_steps=4), red_pairs, tmp_path / "run", runtime)
    out, err = capfd.readouterr()
    starts = [line.split(":")[0] for line in (out + err).splitlines()]
    before = ["data", "tokens", "weights", "forward pass", "probe 0"]
    assert starts == [*before, "probe 4", "step 4/4", "step 4/4", "Done"]


def test_the_configuration_can_be_read_without_the_heavy_libraries() -> None:
    script = (
        "import sys, training.dpo\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_run_has_one_length() -> None:
    with pytest.raises(ValueError, match="epochs and max_steps are both given"):
        DPOConfig(model="m", epochs=2, max_steps=10)
    with pytest.raises(ValueError, match="save_steps 15 is not a multiple of log_steps 10"):
        TrainingRuntime(save_steps=15)
