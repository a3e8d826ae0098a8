"""Direct preference optimisation (Rafailov et al. 2023), top to bottom: config, data, model,
trainer, save.

The loss of a pair is −log σ(β·Δ) with Δ = [log π(chosen) − log π_ref(chosen)] −
[log π(rejected) − log π_ref(rejected)], log-probabilities summed over the answer's tokens and its
end token (eq. 7); `training.labels` has it for labels that are not certain. The trainer is TRL's;
around it are a check of everything that fails silently there, exact resume, and held-out sampling
that stops a run which decays.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from preferences.config import Config
from preferences.errors import InputError
from training import adapters, models, quantization
from training.adapters import LoraConfig
from training.data import Balance, Labels, Pairs, labelled_rows, load_pairs
from training.models import Dtype, Weights
from training.probe import ProbeConfig, Scorer, WellFormed, step_to_save
from training.run import (
    RunFolder,
    TrainingResult,
    TrainingRuntime,
    dataset_fingerprint,
    model_fingerprint,
)

if TYPE_CHECKING:
    from training.hooks import ProgressFn


SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Our names and transformers'."""


class DPOConfig(Config):
    """What to train and how: everything here changes the result."""

    method: Literal["dpo"] = "dpo"
    model: str
    """A folder with weights or a Hub id; what training starts from, and its reference."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    weights: Weights = "lora"
    """What trains: `lora`, an adapter on the frozen model; `qlora`, an adapter on the model in 4
    bits; `full`, all weights, at 16 bytes a parameter."""
    lora: LoraConfig = LoraConfig()
    """The adapter; not looked at with full weights."""
    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the reference, usually 0.01 to 0.5; a small one goes further and
    breaks sooner."""
    labels: Labels = "hard"
    """What a pair's label counts for: `hard`, the truth; `soft`, as much as the pair's probability
    p, by the loss −p·log σ(β·Δ) − (1 − p)·log σ(−β·Δ), which has its least at β·Δ = logit(p)."""
    balance: Balance = "pairs"
    """What counts alike: every pair, or every prompt, whose pairs then share its weight."""
    learning_rate: float = Field(5e-6, gt=0)
    """Peak of the schedule: about 5e-7 to 5e-6 for full weights, ten times that for adapters."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes from its peak: to 0 in a line or half a cosine, or not at all."""
    warmup_share: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0 to its peak."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the pairs; 1 where neither this nor `max_steps` is given."""
    max_steps: int | None = Field(None, ge=1)
    """Updates of the weights, in place of `epochs`."""
    batch_size: int = Field(8, ge=1)
    """Pairs in memory at once."""
    accumulation: int = Field(1, ge=1)
    """Batches gathered for one update, whose loss is the mean over all their pairs."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of prompt and answer together; longer pairs are dropped and counted, not cut."""
    dtype: Dtype = "bfloat16"
    """The numbers the model computes with."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory, about 20 % slower."""
    seed: int = Field(0, ge=0)
    """Of the adapter's start, the order of the pairs, dropout, and the probes' samples."""
    eval_steps: int = Field(100, ge=1)
    """Steps between two evaluations on the held-out pairs; the last step is always evaluated."""
    probe: ProbeConfig | None = ProbeConfig()
    """Held-out sampling while training; null trains blind: metrics do not show a collapse."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both given; give one")
        return self


def train(
    config: DPOConfig,
    dataset: Path,
    output: Path,
    runtime: TrainingRuntime | None = None,
    scorer: Scorer | None = None,
    well_formed: WellFormed | None = None,
    progress: ProgressFn | None = None,
) -> TrainingResult:
    """Align `config.model` with the pairs of `dataset`; weights and `result.json` go to `output`.

    Called again on an unfinished `output` it goes on from the newest complete checkpoint and ends
    with the weights an uninterrupted run has; on a finished one it returns the result. `scorer`
    judges held-out samples against the reference's, `well_formed` adds to what counts as
    malformed. Without `progress` a bar and one line per log go to stderr.

    Raises InputError for what the caller can mend before anything is trained, ServiceError when
    training itself fails; a rerun goes on from the last checkpoint.
    """
    runtime = runtime or TrainingRuntime()
    models.require_libraries(config.weights, runtime.report_to)
    run = RunFolder(output)
    started_from = model_fingerprint(config.model, config.revision)
    data = dataset_fingerprint(dataset)
    with run.claimed(config, started_from, data) as identity, models.quiet_libraries():
        finished = run.result()
        if finished is not None:
            return finished
        from training import hooks

        # Data first: it needs no weights, and most mistakes show in it.
        tokenizer = models.load_tokenizer(config.model, config.revision)
        pairs, held_out = _load_data(config, dataset, tokenizer)
        run.write_dropped({"train": pairs.dropped, "test": held_out.dropped if held_out else ()})

        # Model and trainer. The policy still is the reference, so its samples are the reference's.
        trainer = build_trainer(config, runtime, output, pairs, held_out)
        checkpoint = run.newest_checkpoint()
        run.cut_back(checkpoint.step if checkpoint else -1)
        recorder, prober = hooks.watch(
            trainer, config, run, held_out, scorer, well_formed, progress
        )
        if prober is not None:
            prober.start(checkpoint.probes if checkpoint else ())
        hooks.run_trainer(trainer, config, checkpoint, recorder)

        # Save: the last step's weights, or the best probe's where the last one was bad.
        steps, planned = trainer.state.global_step, trainer.state.max_steps
        saved_step, reason = steps, None
        if prober is not None:
            saved_step, reason = step_to_save(prober.probes, prober.best(), planned)
        saved = output / ("model" if config.weights == "full" else "adapter")
        if saved_step == steps:
            models.save_model(trainer.model, tokenizer, config.weights, config.dtype, saved)
        else:
            shutil.rmtree(saved, ignore_errors=True)
            shutil.copytree(run.best / f"step-{saved_step}", saved)
        best = prober.best() if prober else None
        weights = trainer.model.parameters()
        result = TrainingResult(
            fingerprint=identity,
            method=config.method,
            model=config.model,
            weights=config.weights,
            saved=saved.name,
            saved_step=saved_step,
            steps=steps,
            planned_steps=planned,
            stopped_early=steps < planned,
            reason=reason,
            best_step=best.step if best else None,
            probes=tuple(prober.probes) if prober else (),
            train=pairs.counts,
            test=held_out.counts if held_out else None,
            trainable_parameters=sum(p.numel() for p in weights if p.requires_grad),
            metrics=recorder.metrics,
            evaluation=recorder.evaluation,
        )
        run.finish(result)
        recorder.say(reason or f"Done: {steps} steps, weights in {saved}")
        return result


def _load_data(config: DPOConfig, dataset: Path, tokenizer: Any) -> tuple[Pairs, Pairs | None]:
    ends = models.end_tokens(config.model, config.revision, tokenizer)
    pairs = load_pairs(dataset, "train", tokenizer, ends=ends, max_length=config.max_length)
    held_out = load_pairs(dataset, "test", tokenizer, ends=ends, max_length=config.max_length)
    if pairs is None:
        raise InputError(f"{dataset}: no data/train-*.parquet in it; give a preference dataset")
    if held_out is None and config.probe is not None:
        raise InputError(
            f"{dataset}: probes need held-out prompts and there is no data/test-*.parquet; "
            "add a test split, or say probe: null and train blind"
        )
    return pairs, held_out


def build_trainer(
    config: DPOConfig,
    runtime: TrainingRuntime,
    output: Path,
    pairs: Pairs,
    held_out: Pairs | None,
) -> Any:
    """TRL's trainer for this configuration on the freshly loaded model, with its new adapter on."""
    import torch
    from trl.trainer.utils import disable_dropout_in_model

    from training.hooks import PairTrainer, report_to
    from training.labels import LabelledPairTrainer

    labelled = config.labels == "soft" or config.balance == "prompts"

    def rows(split: Pairs) -> Any:
        return labelled_rows(split, config.labels, config.balance) if labelled else split.rows

    train_rows, held_out_rows = rows(pairs), rows(held_out) if held_out else None
    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    disable_dropout_in_model(model)
    peft_config = None
    if config.weights != "full":
        layers = adapters.target_layers(model, config.lora)
        peft_config = adapters.peft_config(config.lora)
        if config.weights == "qlora":
            import peft

            quantization.require_nf4(model, layers)
            # TRL's DPO trainer does not do this by itself.
            prepare: Any = peft.prepare_model_for_kbit_training
            model = prepare(model, use_gradient_checkpointing=config.gradient_checkpointing)
    kind: Any = LabelledPairTrainer if labelled else PairTrainer
    trainer = kind(
        model=model,
        args=_arguments(config, runtime, output, held_out is not None),
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        processing_class=models.load_tokenizer(config.model, config.revision),
        # The configuration, not a ready adapter: for that TRL would add a second one as reference.
        peft_config=peft_config,
    )
    if config.weights == "qlora":
        # TRL puts these adapters into bfloat16, where small updates round to nothing.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
    report_to(trainer, runtime.report_to, output)
    return trainer


def _arguments(config: DPOConfig, runtime: TrainingRuntime, output: Path, evaluate: bool) -> Any:
    import torch
    from trl.trainer.dpo_config import DPOConfig as TRLConfig

    length = (
        {"max_steps": config.max_steps}
        if config.max_steps is not None
        else {"num_train_epochs": config.epochs or 1.0}
    )
    return TRLConfig(
        output_dir=str(output),
        beta=config.beta,
        loss_type=["sigmoid"],
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES[config.schedule],
        warmup_steps=config.warmup_share,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        bf16=config.dtype == "bfloat16",  # TRL's default is True, on CPU too
        max_length=None,  # too long pairs are gone; TRL would cut off the end token
        disable_dropout=False,  # done on the base model; TRL would disable the adapter's as well
        # Full weights: the reference's log-probabilities, computed once, instead of a second model.
        precompute_ref_log_probs=config.weights == "full",
        eval_strategy="steps" if evaluate else "no",
        eval_steps=config.eval_steps,
        logging_steps=runtime.log_steps,
        logging_nan_inf_filter=False,  # True writes the running mean in place of a NaN
        save_strategy="steps",
        save_steps=runtime.save_steps,
        report_to=["wandb"] if runtime.report_to == "wandb" else [],
        run_name=output.name,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # or bfloat16 is refused there
        dataloader_pin_memory=torch.cuda.is_available(),
        **length,
    )
