"""Direct preference optimisation (Rafailov et al. 2023), top to bottom: config, data, model,
trainer, save.

The loss of a pair is −log σ(β·Δ) with Δ = [log π(chosen) − log π_ref(chosen)] −
[log π(rejected) − log π_ref(rejected)], log-probabilities summed over the answer's tokens and its
end token (eq. 7); `training.labels` has it for labels that are not certain. The trainer is TRL's,
with the forward pass of `training.shared_prefix`; around it are a check of everything that fails
silently there, exact resume, and held-out sampling that stops a run which decays.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from training import adapters, models
from training.data import Balance, Labels, Pairs, labelled_rows, load_pairs, with_margins
from training.evaluation import implicit_reward_accuracy
from training.loop import Method, train
from training.run import TrainingRuntime
from training.settings import TrainingConfig, training_arguments

__all__ = ["METHOD", "DPOConfig", "build_trainer", "train"]


Loss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
]

SOFT = ("sigmoid", "sigmoid_norm", "ipo")
"""Losses that an unsure label makes least at a finite difference."""
SMOOTHED = (*SOFT, "robust", "exo_pair", "aot", "aot_unpaired")
WITH_MARGIN = ("sigmoid", "sigmoid_norm", "hinge")
OF_SINGLE_PAIRS = (*SOFT, "hinge")
"""Losses that are made here where pairs differ in label, margin or weight."""


class DPOConfig(TrainingConfig):
    """What to train and how: everything here changes the result."""

    method: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the reference, usually 0.01 to 0.5; a small one goes further and
    breaks sooner. With `ipo` it is the paper's τ; with `sigmoid_norm`, whose differences are those
    of one token, 2 to 10."""
    loss: Loss = "sigmoid"
    """What is made small. Of Δ: `sigmoid`, DPO's own; `hinge`, SLiC's; `robust`, corrected for a
    known share of wrong labels; `exo_pair`, the reverse divergence from the label; `discopop`, a
    mixture that was searched for. Of Δ a token, so that length is not learnt: `sigmoid_norm`, and
    `ipo`, which aims at 1/(2·beta) instead of ever more. Of each answer's gain by itself, so that
    the chosen one's has to rise: `nca_pair`, `bco_pair`, `sppo_hard`, `apo_zero`; or to fall, where
    chosen answers are worse than the model's: `apo_down`. Of the gains of a whole batch, sorted:
    `aot`, `aot_unpaired`."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share ε of the labels that are wrong, below 1/2. With `sigmoid` this is conservative DPO
    (Mitchell 2023); `robust` and `exo_pair` need one, of about 0.1 and 0.001."""
    labels: Labels = "hard"
    """What a pair's label counts for: `hard`, the truth; `soft`, as much as the pair's probability
    p, by the loss −p·log σ(z) − (1 − p)·log σ(−z) with z = β·Δ − margin, which has its least at
    z = logit(p)."""
    margin: float = Field(0.0, ge=0)
    """By how much of the pair's own margin, a difference of qualities in logits, β·Δ has to differ
    before the pair counts as even (Amini et al. 2024); 0 looks at no margins."""
    balance: Balance = "pairs"
    """What counts alike: every pair, or every prompt, whose pairs then share its weight."""

    @model_validator(mode="after")
    def _fits_its_loss(self) -> Self:
        for key, given, known in (
            ("labels: soft", self.labels == "soft", SOFT),
            ("label_smoothing", self.label_smoothing > 0, SMOOTHED),
            ("margin", self.margin > 0, WITH_MARGIN),
            ("balance: prompts", self.balance == "prompts", OF_SINGLE_PAIRS),
        ):
            if given and self.loss not in known:
                raise ValueError(
                    f"{key} means nothing to loss: {self.loss}; leave it out, or take one of "
                    f"{', '.join(known)}"
                )
        if self.labels == "soft" and self.label_smoothing:
            raise ValueError(
                "labels: soft and label_smoothing both say how sure a label is; give one"
            )
        if self.loss in ("robust", "exo_pair") and not self.label_smoothing:
            usual = {"robust": 0.1, "exo_pair": 0.001}[self.loss]
            raise ValueError(
                f"loss: {self.loss} needs label_smoothing, the share of wrong labels, as {usual}"
            )
        if self.loss.startswith("aot") and self.batch_tokens is not None:
            raise ValueError(
                f"batch_tokens: loss: {self.loss} compares the pairs of a batch, so batches change "
                "what is learnt; leave batch_tokens out"
            )
        if self.loss.startswith("aot") and self.batch_size == 1:
            raise ValueError(
                f"loss: {self.loss} compares the pairs of a batch, and batch_size is 1; make it "
                "larger, or take sigmoid"
            )
        return self

    @property
    def labelled(self) -> bool:
        """Whether pairs differ in what their labels are worth, or TRL's loss knows no such ones."""
        smoothed = self.label_smoothing > 0 and self.loss in SOFT
        return self.labels == "soft" or smoothed or self.margin > 0 or self.balance == "prompts"


def load_data(
    config: DPOConfig, dataset: Path, tokenizer: Any
) -> tuple[Pairs | None, Pairs | None]:
    """Training and held-out pairs, with what the loss takes their labels for."""
    ends = models.end_tokens(config.model, config.revision, tokenizer)

    def load(split: str) -> Pairs | None:
        pairs = load_pairs(dataset, split, tokenizer, ends=ends, max_length=config.max_length)
        if pairs is None or not config.labelled:
            return pairs
        return _labelled(config, with_margins(pairs, dataset, split, config.margin))

    return load("train"), load("test")


def _labelled(config: DPOConfig, pairs: Pairs) -> Pairs:
    rows = labelled_rows(pairs, config.labels, config.balance)
    if config.label_smoothing:
        certain = [1 - config.label_smoothing] * len(rows)
        rows = rows.remove_columns("probability").add_column("probability", certain)
    return dataclasses.replace(pairs, rows=rows)


def build_trainer(
    config: DPOConfig,
    runtime: TrainingRuntime,
    output: Path,
    pairs: Pairs,
    held_out: Pairs | None,
) -> Any:
    """TRL's trainer for this configuration on the freshly loaded model, with its new adapter on."""
    from trl.trainer.dpo_config import DPOConfig as TRLConfig
    from trl.trainer.utils import disable_dropout_in_model

    from training.hooks import report_to
    from training.reference import beforehand
    from training.shared_trainers import SharedLabelledPairTrainer, SharedPairTrainer

    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    disable_dropout_in_model(model)
    model, adapter = adapters.prepare(model, config, config.gradient_checkpointing)
    kind: Any = functools.partial(SharedLabelledPairTrainer, config.loss)
    trainer = (kind if config.labelled else SharedPairTrainer)(
        model=model,
        args=TRLConfig(
            **training_arguments(config, runtime, output, evaluate=held_out is not None),
            beta=config.beta,
            loss_type=[config.loss],
            label_smoothing=config.label_smoothing,
            max_length=None,  # too long pairs are gone; TRL would cut off the end token
            disable_dropout=False,  # done on the base model; TRL would disable the adapter's too
            precompute_ref_log_probs=beforehand(config, len(pairs.rows)),
        ),
        train_dataset=pairs.rows,
        eval_dataset=held_out.rows if held_out else None,
        processing_class=models.load_tokenizer(config.model, config.revision),
        # The configuration, not a ready adapter: for that TRL would add a second one as reference.
        peft_config=adapter,
    )
    trainer.batch_tokens = config.batch_tokens
    adapters.keep_in_float32(trainer.model)
    report_to(trainer, runtime.report_to, output)
    return trainer


METHOD = Method(load_data, build_trainer, implicit_reward_accuracy)
