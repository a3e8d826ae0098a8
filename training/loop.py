"""Training from beginning to end, whatever the method: the run's folder, data, model, probes,
guards, saving, result.

A method is what `Method` holds: its file has the loss, and here is everything around it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from preferences.errors import InputError
from preferences.records import Dropped
from training import adapters, batches, models, processes
from training.curve import learning_curve
from training.data import HeldOutPrompt, SplitCounts
from training.probe import Scorer, WellFormed, step_to_save
from training.run import (
    RunFolder,
    TrainingResult,
    TrainingRuntime,
    dataset_fingerprint,
    model_fingerprint,
)
from training.settings import TrainingConfig, require_optimizer

if TYPE_CHECKING:
    from training.hooks import ProgressFn


class Split(Protocol):
    """One split of a dataset, tokenized; `training.data.Pairs` is one."""

    @property
    def rows(self) -> Any:
        """A `datasets.Dataset` with the columns that the method's trainer reads."""

    @property
    def prompts(self) -> tuple[HeldOutPrompt, ...]:
        """Its distinct prompts in the order of their ids; of the held-out ones, the first are
        probed."""

    @property
    def counts(self) -> SplitCounts:
        """What became of its rows."""

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        """The rows that are not trained on."""


class Trainer(Protocol):
    """What carries the steps out: a `transformers.Trainer`, or what can be used as one."""

    model: Any
    processing_class: Any
    state: Any
    """A `transformers.TrainerState`: `global_step` and `max_steps`."""

    def add_callback(self, callback: Any) -> None:
        """Take a `transformers.TrainerCallback` in."""

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        """Go to the end, from the checkpoint in that folder if one is named; checkpoints are
        written to `checkpoint-STEP` in the run's folder and `on_save` follows."""


@dataclass(frozen=True, slots=True)
class Method:
    """What a training method has of its own. Functions get its own configuration first."""

    load: Callable[[Any, Path, Any], tuple[Split | None, Split | None]]
    """(config, dataset folder, tokenizer): the training split and the held-out one, or None where
    the dataset has no such split. Raises InputError where nothing can be trained on."""
    build: Callable[[Any, TrainingRuntime, Path, Any, Any], Trainer]
    """(config, runtime, the run's folder, training split, held-out split or None): the trainer,
    on the freshly loaded model with what trains put on it."""
    evaluate: Callable[[Any, Path, Path], Any]
    """(config, the run's folder, dataset folder): a record of what the saved weights learnt, on
    held-out data."""
    unit: str = "pairs"
    """What a batch is counted in."""
    learnt: str | None = None
    """What an update is counted in, where that is something else."""
    accuracy: str | None = "eval_rewards/accuracies"
    """What its trainer calls the held-out accuracy, for early stopping; None where it has none."""
    chats: bool = True
    """Whether its data are conversations, which only a chat template makes tokens of."""


def train(
    config: TrainingConfig,
    dataset: Path,
    output: Path,
    runtime: TrainingRuntime | None = None,
    scorer: Scorer | None = None,
    well_formed: WellFormed | None = None,
    progress: ProgressFn | None = None,
) -> TrainingResult:
    """Train `config.model` on `dataset` by `config.method`; weights and `result.json` go to
    `output`.

    Called again on an unfinished `output` it goes on from the newest complete checkpoint and ends
    with the weights an uninterrupted run has; on a finished one it returns the result. `scorer`
    judges held-out samples against the reference's, `well_formed` adds to what counts as
    malformed. Without `progress` a bar and one line per log go to stderr. With several `processes`
    each of them calls it alike, as by torchrun; the first one asks `scorer` and writes.

    Raises InputError for what the caller can mend before anything is trained, ServiceError when
    training itself fails; a rerun goes on from the last checkpoint.
    """
    from training.methods import method_of

    method = method_of(config)
    runtime = runtime or TrainingRuntime()
    models.require_libraries(config.weights, runtime.report_to)
    require_optimizer(config)
    models.require_dtype(config.dtype, config.method, config.weights)
    processes.join(config, runtime)
    run = RunFolder(output, runtime.sharding)
    started_from = processes.from_main(lambda: model_fingerprint(config.model, config.revision))
    data = processes.from_main(lambda: dataset_fingerprint(dataset))
    with run.claimed(config, started_from, data) as identity, models.quiet_libraries():
        finished = processes.from_main(run.result)
        if finished is not None:
            return finished
        from training import hooks

        # Data first: it needs no weights, and most mistakes show in it.
        tokenizer = models.load_tokenizer(config.model, config.revision, method.chats)
        learnt, held_out = _load(method, config, dataset, tokenizer)
        _can_stop_early(method, config, scorer)
        run.write_dropped({"train": learnt.dropped, "test": held_out.dropped if held_out else ()})

        # Model and trainer.
        trainer = method.build(config, runtime, output, learnt, held_out)
        checkpoint = processes.from_main(run.newest_checkpoint)
        run.cut_back(checkpoint.step if checkpoint else -1)
        watch = hooks.watch(trainer, config, method, run, held_out, scorer, well_formed, progress)
        counts = adapters.parameter_counts(trainer.model)
        for line in [*_told(method, config, learnt, held_out), f"weights: {counts}"]:
            watch.recorder.say(line)
        forward_pass = getattr(trainer, "forward_pass", None)  # Of those that have several.
        if forward_pass is not None:
            watch.recorder.say(f"forward pass: {forward_pass}")
        if watch.prober is not None:
            # Some adapters change the model before any training.
            with adapters.reference(trainer.model):
                watch.prober.start(checkpoint.probes if checkpoint else ())
        hooks.run_trainer(trainer, config, method.unit, checkpoint, watch.recorder)

        # Save: the last step's weights, or earlier ones where those were better.
        steps, planned = trainer.state.global_step, trainer.state.max_steps
        probes = watch.prober.probes if watch.prober else []
        best = watch.prober.best() if watch.prober else None
        saved_step, reason = steps, None
        if probes:
            saved_step, reason = step_to_save(probes, best, planned)
        if watch.stopper is not None and reason is None:
            saved_step, reason = watch.stopper.step_to_save(steps, planned)
        saved = output / models.saved_folder(config.weights)
        if saved_step == steps:
            models.save_model(trainer.model, tokenizer, config.weights, config.dtype, saved)
        elif processes.is_main():
            shutil.rmtree(saved, ignore_errors=True)
            shutil.copytree(run.best / f"step-{saved_step}", saved)
        result = TrainingResult(
            fingerprint=identity,
            method=config.method,
            model=config.model,
            weights=config.weights,
            saved=saved.name,
            saved_step=saved_step,
            steps=steps,
            planned_steps=planned,
            update=config.update,
            stopped_early=steps < planned,
            reason=reason,
            best_step=best.step if best else None,
            probes=tuple(probes),
            train=learnt.counts,
            test=held_out.counts if held_out else None,
            trainable_parameters=counts.trainable,
            metrics=watch.recorder.metrics,
            evaluation=watch.recorder.evaluation,
        )
        run.write_curve(learning_curve(run.metrics()))
        run.finish(result)
        processes.wait()
        watch.recorder.say(reason or f"Done: {steps} steps, weights in {saved}")
        return result


def _load(
    method: Method, config: TrainingConfig, dataset: Path, tokenizer: Any
) -> tuple[Split, Split | None]:
    learnt, held_out = method.load(config, dataset, tokenizer)
    if learnt is None:
        raise InputError(f"{dataset}: no data/train-*.parquet in it; give a finished dataset")
    if held_out is None and config.probe is not None:
        raise InputError(
            f"{dataset}: probes need held-out prompts and there is no data/test-*.parquet; "
            "add a test split, or say probe: null and train blind"
        )
    if held_out is None and config.early_stopping is not None:
        raise InputError(
            f"{dataset}: early_stopping looks at held-out {method.unit} and there is no "
            "data/test-*.parquet; add a test split, or say early_stopping: null"
        )
    return learnt, held_out


def _can_stop_early(method: Method, config: TrainingConfig, scorer: Scorer | None) -> None:
    metric = config.early_stopping.metric if config.early_stopping else None
    if metric == "accuracy" and method.accuracy is None:
        raise InputError(f"early_stopping.metric: {config.method} has no accuracy; say loss")
    if metric == "win_rate" and scorer is None:
        raise InputError(
            "early_stopping.metric: win_rate needs a judge that can be asked about new answers; "
            "add one, or say loss"
        )


def _told(
    method: Method, config: TrainingConfig, learnt: Split, held_out: Split | None
) -> list[str]:
    """What a person should know before hours are spent, in lines."""
    told = f"{learnt.counts.kept:,} {method.unit} to train on"
    if held_out is not None:
        told += f", {held_out.counts.kept:,} held out"
    update = f"{config.update:,} {method.learnt or method.unit} an update"
    if config.accumulation > 1:
        update += f" ({config.accumulation} batches of {config.batch_size})"
    lines = [f"data: {told}; {update}", *batches.told(config, learnt.rows)]
    if method.learnt is None and learnt.counts.kept < config.update:
        lines.append(
            f"warning: {learnt.counts.kept:,} {method.unit} are fewer than an update's "
            f"{config.update:,}"
        )
    if processes.count() > 1:
        lines.append(f"processes: {processes.count()}, each with its share of every batch")
        rest = len(learnt.rows) % config.batch_size
        if rest:
            lines.append(
                f"warning: {rest:,} {method.unit} are left for an epoch's last batch; it is filled "
                f"up to {config.batch_size:,} from its beginning, which in one process it is not"
            )
    for split, counts in (("train", learnt.counts), ("test", held_out and held_out.counts)):
        if not counts:
            continue
        found = {
            **counts.dropped,
            "with a shifted boundary": counts.boundary_shifted,
            "without an end token": counts.without_end,
            "answers left out as too long": counts.answers_left_out,
        }
        odd = ", ".join(f"{number:,} {what}" for what, number in found.items() if number)
        if odd:
            lines.append(f"{split}: of {counts.rows:,} {method.unit}, {odd}")
    return lines
