"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024) from likes and dislikes, top to bottom:
config, data, model, trainer.

With r = log π(answer) − log π_ref(answer), summed over the answer's tokens and its end token, the
loss of a liked answer is λ_D·[1 − σ(β·(r − z))] and of a disliked one λ_U·[1 − σ(β·(z − r))] (eq. 7
and 8). z = max(0, mean of r over answers put to other prompts) estimates how far the policy has
moved from its reference, and is not differentiated. The trainer is TRL's, with the forward pass of
`training.shared_prefix`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from preferences.errors import InputError
from training import adapters, models
from training.answers import Answers, liked_and_disliked, tokenize
from training.evaluation import implicit_reward_accuracy
from training.loop import Method, train
from training.run import TrainingRuntime
from training.settings import TrainingConfig, training_arguments

__all__ = ["METHOD", "KTOConfig", "build_trainer", "train"]


class KTOConfig(TrainingConfig):
    """What to train and how: everything here changes the result."""

    method: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the reference, usually 0.01 to 0.5; a small one goes further and
    breaks sooner."""
    batch_size: int = Field(8, ge=2)
    """Answers in memory at once; z is a mean over them, so one is not enough."""
    desirable_weight: float | None = Field(None, gt=0)
    """λ_D, what a liked answer counts for; without it and `undesirable_weight`, likes and dislikes
    weigh alike together and 1 on average, however many there are of each."""
    undesirable_weight: float | None = Field(None, gt=0)
    """λ_U, what a disliked answer counts for."""


def load_data(
    config: KTOConfig, dataset: Path, tokenizer: Any
) -> tuple[Answers | None, Answers | None]:
    """Training and held-out answers, each with the answer to another prompt that z is made of."""
    train, test = (_load_split(config, dataset, tokenizer, split) for split in ("train", "test"))
    return train, test


def _load_split(config: KTOConfig, dataset: Path, tokenizer: Any, split: str) -> Answers | None:
    found = liked_and_disliked(dataset, split)
    if found is None:
        return None
    ends = models.end_tokens(config.model, config.revision, tokenizer)
    where = f"{dataset}: {split}"
    answers = tokenize(*found, tokenizer, ends=ends, max_length=config.max_length, where=where)
    likes = sum(answers.rows["label"])
    dislikes = len(answers.rows) - likes
    if split == "train" and not (likes and dislikes):
        raise InputError(
            f"{where}: {likes} likes and {dislikes} dislikes, and KTO needs both; add some, or "
            "train on what was liked with method: sft"
        )
    rows = with_other_answers(answers.rows, config.max_length, where)
    return dataclasses.replace(answers, rows=rows)


def with_other_answers(rows: Any, max_length: int, where: str) -> Any:
    """The rows, each with a column `other_ids`: an answer that was given to another prompt.

    Every answer is used once, and cut where it would not fit after its new prompt.
    """
    prompt_ids, prompts, answers = (
        list(rows[name]) for name in ("prompt_id", "prompt_ids", "answer_ids")
    )
    (most, number), *_ = Counter(prompt_ids).most_common(1)
    if 2 * number > len(rows):
        raise InputError(
            f"{where}: {number} of {len(rows)} answers are to prompt {most}, so that not every one "
            "can be compared with an answer to another; add prompts, or drop some of its answers"
        )
    # With all of a prompt's rows together, a shift by the most that any has leaves none its own.
    order = sorted(range(len(rows)), key=lambda n: (prompt_ids[n], n))
    others: list[list[int]] = [[]] * len(rows)
    for place, n in enumerate(order):
        other = answers[order[(place + number) % len(order)]]
        others[n] = other[: max_length - len(prompts[n])]
    return rows.add_column("other_ids", others)


def label_weights(config: KTOConfig, labels: Sequence[bool]) -> tuple[float, float]:
    """λ_D and λ_U, of likes and of dislikes.

    Where neither is set, λ_D·likes = λ_U·dislikes and their mean over the answers is 1.
    """
    if config.desirable_weight is not None or config.undesirable_weight is not None:
        return config.desirable_weight or 1.0, config.undesirable_weight or 1.0
    likes = sum(labels)
    return len(labels) / (2 * likes), len(labels) / (2 * (len(labels) - likes))


def build_trainer(
    config: KTOConfig,
    runtime: TrainingRuntime,
    output: Path,
    answers: Answers,
    held_out: Answers | None,
) -> Any:
    """TRL's trainer for this configuration on the freshly loaded model, with its new adapter on."""
    from trl.trainer.kto_config import KTOConfig as TRLConfig
    from trl.trainer.utils import disable_dropout_in_model

    from training.hooks import report_to
    from training.reference import beforehand
    from training.shared_trainers import SharedLikesTrainer

    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    disable_dropout_in_model(model)
    model, adapter = adapters.prepare(model, config, config.gradient_checkpointing)
    desirable, undesirable = label_weights(config, answers.rows["label"])
    trainer = SharedLikesTrainer(
        model=model,
        args=TRLConfig(
            **training_arguments(config, runtime, output, evaluate=held_out is not None),
            beta=config.beta,
            desirable_weight=desirable,
            undesirable_weight=undesirable,
            max_length=None,  # too long answers are gone; TRL would cut off the end token
            disable_dropout=False,  # done on the base model; TRL would disable the adapter's too
            precompute_ref_log_probs=beforehand(config, len(answers.rows)),
        ),
        train_dataset=_named(answers.rows),
        eval_dataset=_named(held_out.rows) if held_out else None,
        processing_class=models.load_tokenizer(config.model, config.revision),
        # The configuration, not a ready adapter: for that TRL would add a second one as reference.
        peft_config=adapter,
    )
    trainer.batch_tokens = config.batch_tokens
    adapters.keep_in_float32(trainer.model)
    report_to(trainer, runtime.report_to, output)
    return trainer


def _named(rows: Any) -> Any:
    """The columns by TRL's names."""
    rows = rows.select_columns(["prompt_ids", "answer_ids", "other_ids", "label"])
    return rows.rename_columns({"answer_ids": "completion_ids", "other_ids": "KL_completion_ids"})


METHOD = Method(load_data, build_trainer, implicit_reward_accuracy, unit="answers", accuracy=None)
