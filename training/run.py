"""The folder of one training run: what it is, how far it came, what came out.

config.json      configuration, fingerprints of model and dataset; written first
metrics.jsonl    one line per log or probe
samples.jsonl    what the policy answered in every probe
dropped.jsonl    pairs that were not trained on, with the reason
checkpoint-40/   weights, optimizer and random state; complete when `complete.json` is in it
best/step-40/    the best probe's or evaluation's weights so far, as they would be published
adapter/ model/  the trained weights
curve.svg        losses and probes by step
result.json      written last: its existence means the run is finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from preferences.config import Config
from preferences.errors import InputError
from preferences.fingerprint import canonical_json, file_fingerprint, fingerprint
from preferences.records import Dropped
from preferences.tables import folder_fingerprint
from training import processes
from training.data import SplitCounts
from training.probe import Probe
from training.processes import FSDPConfig, by_main

CHECKPOINTS_KEPT = 2
"""The newest can be torn by a crash while it is written, so the one before it stays."""

JOURNALS = ("metrics.jsonl", "samples.jsonl")


class TrainingRuntime(Config):
    """Where and how a run goes. Nothing here changes the weights or bears identity."""

    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics also go, beside `metrics.jsonl` and the console."""
    log_steps: int = Field(10, ge=1)
    """Steps between two lines of metrics."""
    save_steps: int = Field(100, ge=1)
    """Steps between two checkpoints, a multiple of `log_steps`; a crash loses at most so many."""
    processes: int = Field(1, ge=1)
    """Processes that train together, one a GPU. Each takes its share of every batch, so that an
    update is of as many examples as ever; `batch_size` has to be a multiple."""
    fsdp: FSDPConfig | None = None
    """Divide weights, gradients and optimizer among the processes; else each has all of them."""
    deepspeed: dict[str, Any] | None = None
    """Divide gradients and optimizer by DeepSpeed, whose own configuration this is."""

    @property
    def sharding(self) -> str:
        """Who divides the model among the processes; checkpoints fit this alone."""
        if self.fsdp is not None:
            return "fsdp"
        return "deepspeed" if self.deepspeed is not None else "ddp"

    @model_validator(mode="after")
    def _save_on_a_log(self) -> Self:
        # A checkpoint between two logs would lose the half-gathered averages, and the metrics of an
        # interrupted run would differ from those of an uninterrupted one.
        if self.save_steps % self.log_steps:
            raise ValueError(
                f"save_steps {self.save_steps} is not a multiple of log_steps {self.log_steps}"
            )
        return self


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a finished run did, as in `result.json`."""

    fingerprint: str
    """Identity of configuration, model and dataset, wherever they lie."""
    method: str
    model: str
    """What training started from; also the reference."""
    weights: str
    saved: str
    """The folder with the trained weights, inside the run's: `adapter` or `model`."""
    saved_step: int
    """The step the saved weights are from; 0 is the reference itself."""
    steps: int
    planned_steps: int
    update: int
    """Examples, as pairs or answers, that one step was made of."""
    stopped_early: bool
    reason: str | None
    """Why the run stopped early or did not save its last step, in one sentence."""
    best_step: int | None
    """The best probe's step; None where nothing was probed."""
    probes: tuple[Probe, ...]
    train: SplitCounts
    test: SplitCounts | None
    trainable_parameters: int
    metrics: dict[str, float]
    """The last training metrics."""
    evaluation: dict[str, float]
    """The last metrics on the held-out pairs; empty where there are none."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint, safe to resume from."""

    step: int
    folder: Path
    probes: tuple[Probe, ...]


class RunFolder:
    """A run's files. Everything that decides whether to resume is here."""

    def __init__(self, path: Path, sharding: str = "ddp") -> None:
        """`sharding` is the runtime's."""
        self.path = path
        self.identity: str | None = None
        """The run's fingerprint, once it is claimed."""
        self.sharding = sharding

    @property
    def best(self) -> Path:
        """The folder of the weights that were best so far."""
        return self.path / "best"

    @contextlib.contextmanager
    def claimed(self, config: Config, model: str, data: str) -> Iterator[str]:
        """Hold the folder for this process and those that train with it; yields the run's
        fingerprint.

        `model` and `data` are what the model and the dataset are, wherever they lie: a run whose
        folders were moved is the same run.

        Raises InputError if the folder belongs to another configuration, model or dataset, to
        something that is no run, or to a process that is training in it now.
        """
        from filelock import FileLock, Timeout

        values = config.model_dump(mode="json", exclude={"model"})
        identity = fingerprint({"config": values, "model": model, "data": data})
        if not processes.is_main():
            processes.wait()  # for the main process to hold it
            self.identity = identity
            yield identity
            return
        # Asked before the lock is taken, whose file would make every folder look used.
        names = [] if not self.path.exists() else [p.name for p in self.path.iterdir()]
        strangers = sorted(set(names) - {".lock", "config.json.part"})
        if strangers and "config.json" not in names:
            raise InputError(
                f"{self.path}: not a training run (it has {strangers[0]} and no config.json); "
                "choose an empty folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self._same_run(config, model, data, identity)
                processes.wait()
                self.identity = identity
                yield identity
        except Timeout:
            raise InputError(
                f"{self.path}: another process is training here; wait for it or choose another"
            ) from None

    def _same_run(self, config: Config, model: str, data: str, identity: str) -> None:
        file = self.path / "config.json"
        values = config.model_dump(mode="json")
        if not file.exists():
            start = {"fingerprint": identity, "model": model, "data": data, "config": values}
            write_json(file, start)
            return
        before = json.loads(file.read_text())
        if before["fingerprint"] == identity:
            return
        changed = [
            f"{key} was {before['config'].get(key)!r} and is {value!r}"
            for key, value in values.items()
            if before["config"].get(key) != value and key != "model"
        ]
        if before.get("model") != model:
            changed.append(f"its model was {before['config'].get('model')}, of other content")
        if before["data"] != data:
            changed.append("the dataset changed")
        raise InputError(
            f"{self.path}: holds another run ({'; '.join(changed) or 'it changed'}); "
            "choose another folder, or delete this one to start again"
        )

    def result(self) -> TrainingResult | None:
        """The finished run's result, or None."""
        file = self.path / "result.json"
        if not file.exists():
            return None
        return TypeAdapter(TrainingResult).validate_json(file.read_text())

    @by_main
    def finish(self, result: TrainingResult) -> None:
        """Write the result, last; what only an unfinished run needs goes away."""
        write_json(self.path / "result.json", dataclasses.asdict(result))
        for folder in [*self.path.glob("checkpoint-*"), self.best]:
            shutil.rmtree(folder, ignore_errors=True)

    @by_main
    def complete(self, step: int, probes: tuple[Probe, ...], best: Collection[int]) -> None:
        """Mark the checkpoint of `step` complete; then older ones and surpassed weights may go.

        `best` are the steps whose weights a run that goes on from here may publish.
        """
        folder = self.path / f"checkpoint-{step}"
        value = {
            "run": self.identity,
            "sharding": self.sharding,
            "step": step,
            "files": _sizes(folder),
            "best": sorted(best),
            "probes": [dataclasses.asdict(probe) for probe in probes],
        }
        write_json(folder / "complete.json", value)
        folders = self._checkpoint_folders()
        for old in folders[CHECKPOINTS_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        # Weights stay that any kept checkpoint calls its best: the run may resume from either.
        marks = [_read_mark(folder) or {} for folder in folders[:CHECKPOINTS_KEPT]]
        needed = {f"step-{step}" for mark in marks for step in mark.get("best", ())}
        for weights in self.best.glob("step-*"):
            if weights.name not in needed:
                shutil.rmtree(weights, ignore_errors=True)

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint all of whose files are there in full, or None.

        Raises InputError if one was put here that another run wrote.
        """
        for folder in self._checkpoint_folders():
            mark = _read_mark(folder)
            if mark is None:
                continue
            if self.identity is not None and mark["run"] != self.identity:
                raise InputError(
                    f"{folder}: a checkpoint of another run, with other settings, model or data; "
                    "delete it, and this run goes on from its own"
                )
            written = mark.get("sharding", "ddp")
            if written != self.sharding:
                raise InputError(
                    f"{folder}: was written with {written}, and this run has {self.sharding}; go "
                    f"on with {written}, or delete its checkpoints to begin again"
                )
            sizes = _sizes(folder)
            whole = all(sizes.get(name) == size for name, size in mark["files"].items())
            if whole and all((self.best / f"step-{step}").is_dir() for step in mark["best"]):
                probes = TypeAdapter(tuple[Probe, ...]).validate_python(mark["probes"])
                return Checkpoint(mark["step"], folder, probes)
        return None

    def _checkpoint_folders(self) -> list[Path]:
        """Newest first, complete or not."""
        steps = {int(p.name.split("-")[1]): p for p in self.path.glob("checkpoint-*") if p.is_dir()}
        return [steps[step] for step in sorted(steps, reverse=True)]

    @by_main
    def write_dropped(self, splits: Mapping[str, Sequence[Dropped]]) -> None:
        """Write the pairs that are not trained on, by split, into `dropped.jsonl`."""
        lines = [
            json.dumps({"split": split, **dataclasses.asdict(drop)}, ensure_ascii=False) + "\n"
            for split, dropped in splits.items()
            for drop in dropped
        ]
        write_text(self.path / "dropped.jsonl", "".join(lines))

    @by_main
    def append(self, journal: str, line: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl` or `samples.jsonl`."""
        with (self.path / journal).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, in their order."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def write_curve(self, picture: str) -> None:
        """Write the learning curve, an SVG."""
        write_text(self.path / "curve.svg", picture)

    @by_main
    def cut_back(self, step: int) -> None:
        """Forget what was logged and saved after `step`: the resumed run does it again."""
        for folder in self._checkpoint_folders():
            if int(folder.name.split("-")[1]) > step:
                # Its mark would make a new checkpoint look complete while it is being written.
                shutil.rmtree(folder)
        for journal in JOURNALS:
            file = self.path / journal
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            kept = [line for line in lines if _step_of(line) <= step]
            write_text(file, "".join(line + "\n" for line in kept))


def model_fingerprint(model: str, revision: str | None) -> str:
    """Identity of what training starts from: a folder's content, or a Hub model's name."""
    folder = Path(model)
    return folder_fingerprint(folder) if folder.is_dir() else f"{model}@{revision or 'main'}"


def dataset_fingerprint(dataset: Path) -> str:
    """Content identity of a dataset folder's Parquet files, in the order of their names."""
    files = sorted((dataset / "data").glob("*.parquet"))
    if not files:
        raise InputError(f"{dataset}: no data/train-*.parquet in it; give a preference dataset")
    identities = []
    for file in files:
        with file.open("rb") as stream:
            identities.append([file.name, file_fingerprint(stream)])
    return fingerprint(identities)


def write_json(file: Path, value: Any) -> None:
    """`value` into `file`, whole or not at all."""
    json.loads(canonical_json(value))  # refuses NaN, which is not JSON
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@by_main
def write_text(file: Path, text: str) -> None:
    """`text` into `file`, whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _sizes(folder: Path) -> dict[str, int]:
    """Of the files in a checkpoint, by their places in it; some are in folders of their own."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "complete.json"
    }


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """What `complete.json` says of a checkpoint; None where there is none."""
    try:
        mark: dict[str, Any] = json.loads((folder / "complete.json").read_text())
    except (OSError, ValueError):
        return None
    return mark


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")  # torn by the crash
