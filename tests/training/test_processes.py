"""Two processes train to the weights that one does, and end together."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from safetensors.torch import load_file

from flows.children import in_children
from preferences.errors import InputError, MissingExtra, ServiceError
from tests.training.conftest import QUICK, equal, saved_weights, silent
from training import processes
from training.dpo import DPOConfig
from training.loop import train
from training.methods import Alignment
from training.processes import FSDPConfig
from training.run import RunFolder, TrainingResult, TrainingRuntime
from training.settings import EarlyStopping, TrainingConfig

TOGETHER = TrainingRuntime(log_steps=4, save_steps=4, processes=2)
ALONE = TOGETHER.model_copy(update={"processes": 1})
ZERO_3 = {"zero_optimization": {"stage": 3}}
MakeConfig = Callable[..., DPOConfig]


@dataclass(frozen=True)
class Job:
    """A training, as it is told to other processes."""

    config: TrainingConfig
    dataset: Path
    output: Path
    runtime: TrainingRuntime = TOGETHER
    dies: int | None = None
    """The step at which the second process is killed."""


def work(jobs: list[Job]) -> list[TrainingResult]:
    """In each of the processes: one training after the other."""
    import torch

    torch.set_num_threads(1)
    return [train_one(job) for job in jobs]


def train_one(job: Job) -> TrainingResult:
    pid = job.output.with_suffix(".pid")
    if os.environ["RANK"] == "1":
        pid.write_text(str(os.getpid()))

    def progress(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        assert os.environ["RANK"] == "0", "one process shows how far all are"
        if step == job.dies:
            os.kill(int(pid.read_text()), signal.SIGKILL)

    return train(job.config, job.dataset, job.output, job.runtime, progress=progress)


def work_divided(jobs: list[Job]) -> list[TrainingResult]:
    """The same with FSDP2 as on GPUs: torch divides a model among processes of a CPU too, and only
    accelerate has to be told that it should."""
    from accelerate.state import PartialState  # type: ignore[import-untyped]
    from accelerate.utils import DistributedType  # type: ignore[import-untyped]

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    gpus: Any = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # noqa: E731
    PartialState._prepare_backend = gpus
    processes.require_gpus = lambda *_: None
    return work(jobs)


def together(*jobs: Job) -> list[TrainingResult]:
    return in_children("training", 2, work, list(jobs))


def change(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a LoRA run added to each matrix: alpha/rank·B·A, with alpha 32 and rank 16."""
    return {
        name: 2 * saved[name.replace("lora_A", "lora_B")].double() @ below.double()
        for name, below in saved.items()
        if "lora_A" in name
    }


def assert_nearly_equal(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    within: float = 1e-6,
) -> None:
    """Within so much of each matrix; of `base`, if given, to which they were added.

    Sums over two processes round otherwise than one's, and Adam makes much of gradients that are
    nothing but rounding.
    """
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        place = name.removeprefix("base_model.model.").replace(".lora_A", "")
        whole = tensor if base is None else tensor + base[place]
        assert (tensor - theirs[name]).norm() <= within * whole.norm(), name


@pytest.mark.timeout(900)
def test_two_processes_end_with_the_weights_of_one(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_config(accumulation=2, max_steps=12, learning_rate=1e-3)
    alone = train(config, red_pairs, tmp_path / "alone", ALONE, progress=silent)
    (both,) = together(Job(config, red_pairs, tmp_path / "both"))
    assert (both.steps, both.update, both.fingerprint) == (12, 8, alone.fingerprint)
    base = load_file(Path(config.model) / "model.safetensors")
    ours, theirs = (saved_weights(tmp_path / run, both) for run in ("both", "alone"))
    assert_nearly_equal(change(ours), change(theirs), base)
    assert both.probes == alone.probes
    assert both.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-6)
    assert both.evaluation == pytest.approx(alone.evaluation, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_of_which_one_process_was_killed_goes_on_and_ends_as_if_it_had_not_been(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    # With dropout, so that the random state of each process matters.
    config = make_config(max_steps=12, lora={"rank": 4, "dropout": 0.2})
    whole = Job(config, red_pairs, tmp_path / "whole")
    killed = Job(config, red_pairs, tmp_path / "killed", dies=10)
    with pytest.raises(ServiceError, match="training was killed"):
        together(whole, killed)
    checkpoint = RunFolder(killed.output).newest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.step == 8
    (resumed,) = together(replace(killed, dies=None))
    assert resumed == RunFolder(whole.output).result()
    assert equal(saved_weights(killed.output, resumed), saved_weights(whole.output, resumed))
    journals = [(run.output / "metrics.jsonl").read_text() for run in (whole, killed)]
    assert journals[0] == journals[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_processes_stop_early_at_the_step_at_which_one_would(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    # A step so long that the held-out loss soon rises.
    stopping = EarlyStopping(patience=1)
    config = make_config(learning_rate=0.05, eval_steps=1, early_stopping=stopping)
    alone = train(config, red_pairs, tmp_path / "alone", ALONE, progress=silent)
    (both,) = together(Job(config, red_pairs, tmp_path / "both"))
    assert both.stopped_early
    assert (both.steps, both.saved_step) == (alone.steps, alone.saved_step)
    assert both.reason == alone.reason


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dpo", "weights": "full"},
        {"method": "sft", "weights": "full"},
        {"method": "kto", "weights": "full"},
        {"method": "reward", "weights": "full"},
        {"method": "orpo"},
        {"method": "dpo", "labels": "soft", "gradient_checkpointing": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_method_learns_in_two_processes_what_it_learns_in_one(
    model: str, red_pairs: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    given = {**QUICK, "learning_rate": 2e-4, "max_steps": 8, "accumulation": 2, "probe": None}
    config = TypeAdapter(Alignment).validate_python({**given, "model": model, **settings})
    alone = train(config, red_pairs, tmp_path / "alone", ALONE, progress=silent)
    (both,) = together(Job(config, red_pairs, tmp_path / "both"))
    ours, theirs = (saved_weights(tmp_path / run, both) for run in ("both", "alone"))
    if config.weights == "full":
        assert_nearly_equal(ours, theirs)
    else:
        base = load_file(Path(model) / "model.safetensors")
        assert_nearly_equal(change(ours), change(theirs), base)
    assert both.metrics == pytest.approx(alone.metrics, rel=1e-3, abs=1e-5)
    assert both.evaluation == pytest.approx(alone.evaluation, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_divided_among_processes_learns_the_same_also_after_one_was_killed(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_config(weights="full", max_steps=12, learning_rate=2e-4)
    alone = train(config, red_pairs, tmp_path / "alone", ALONE, progress=silent)
    runtime = TOGETHER.model_copy(update={"fsdp": FSDPConfig()})
    whole = Job(config, red_pairs, tmp_path / "whole", runtime)
    lora = make_config(max_steps=4, accumulation=2, gradient_checkpointing=True)
    adapter = Job(lora, red_pairs, tmp_path / "adapter", runtime)
    killed = Job(config, red_pairs, tmp_path / "killed", runtime, dies=10)
    with pytest.raises(ServiceError, match="training was killed"):
        in_children("training", 2, work_divided, [whole, adapter, killed])
    (resumed,) = in_children("training", 2, work_divided, [replace(killed, dies=None)])
    assert resumed == RunFolder(whole.output).result()
    assert equal(saved_weights(killed.output, resumed), saved_weights(whole.output, resumed))
    ours, theirs = (saved_weights(run, alone) for run in (whole.output, tmp_path / "alone"))
    assert_nearly_equal(ours, theirs, within=1e-5)
    assert resumed.metrics == pytest.approx(alone.metrics, rel=1e-3, abs=1e-5)

    base = load_file(Path(config.model) / "model.safetensors")
    alone = train(lora, red_pairs, tmp_path / "lora", ALONE, progress=silent)
    told = RunFolder(adapter.output).result()
    assert told is not None
    ours, theirs = (saved_weights(run, alone) for run in (adapter.output, tmp_path / "lora"))
    # TRL's forward pass, with padding, rounds otherwise than the shared one.
    assert_nearly_equal(change(ours), change(theirs), base, within=1e-4)
    assert told.metrics == pytest.approx(alone.metrics, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "runtime", "told"),
    [
        (
            {"batch_size": 3},
            {"processes": 2},
            "processes: 2 cannot share out batches of 3; say batch_size: 4",
        ),
        ({"loss": "aot"}, {"processes": 2}, "aot sorts a whole batch"),
        ({"batch_tokens": 99}, {"processes": 2}, "leave one of the two out"),
        ({"method": "ppo"}, {"processes": 2}, "ppo trains in one; say processes: 1"),
        ({}, {"fsdp": {}}, "processes is 1; say how many"),
        ({}, {"processes": 2, "fsdp": {}, "deepspeed": {}}, "give one"),
        ({"weights": "qlora"}, {"processes": 2, "fsdp": {}}, "weights: qlora cannot be divided"),
        ({}, {"processes": 2, "deepspeed": ZERO_3}, "fsdp: {} divides the same"),
        ({}, {"processes": 2}, "processes: 2, and 1 started"),
    ],
)
def test_what_several_processes_cannot_train_alike_is_refused_with_a_cure(
    settings: dict[str, Any],
    runtime: dict[str, Any],
    told: str,
    model: str,
    red_pairs: Path,
    tmp_path: Path,
) -> None:
    config = TypeAdapter(Alignment).validate_python({**settings, "model": model})
    with pytest.raises(InputError) as refused:
        train(config, red_pairs, tmp_path / "run", TrainingRuntime.model_validate(runtime))
    assert told in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_library_that_divides_the_model_and_is_missing_is_named_with_the_cure(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    runtime = TOGETHER.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 2}}})
    with pytest.raises(MissingExtra, match="pip install deepspeed; or say fsdp"):
        train(make_config(), red_pairs, tmp_path / "run", runtime)


def test_a_model_is_not_divided_on_the_cpu_where_accelerate_would_do_nothing_and_not_say_so(
    make_config: MakeConfig, red_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    runtime = TOGETHER.model_copy(update={"fsdp": FSDPConfig()})
    with pytest.raises(InputError, match="need GPUs; leave them out to train on the CPU"):
        train(make_config(), red_pairs, tmp_path / "run", runtime)


def test_a_checkpoint_of_a_divided_model_is_not_gone_on_from_with_a_whole_one(
    tmp_path: Path,
) -> None:
    divided = RunFolder(tmp_path, TrainingRuntime(processes=2, fsdp=FSDPConfig()).sharding)
    (tmp_path / "checkpoint-8" / "pytorch_model_fsdp_0").mkdir(parents=True)
    part = tmp_path / "checkpoint-8" / "pytorch_model_fsdp_0" / "0.distcp"
    part.write_bytes(b"1234")
    divided.complete(8, (), ())
    found = divided.newest_checkpoint()
    assert found is not None
    assert found.step == 8
    with pytest.raises(InputError, match="written with fsdp, and this run has ddp"):
        RunFolder(tmp_path).newest_checkpoint()
    part.write_bytes(b"123")  # torn
    assert divided.newest_checkpoint() is None


def test_deepspeed_is_told_what_the_recipe_says_already() -> None:
    given = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    runtime = TrainingRuntime(processes=2, deepspeed=given)
    told = processes.arguments(runtime)["deepspeed"]
    assert told["zero_optimization"] == given["zero_optimization"]
    assert told["train_micro_batch_size_per_gpu"] == "auto"
    assert processes.arguments(TOGETHER) == {}
