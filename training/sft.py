"""Supervised fine-tuning on a dataset's best answers, top to bottom: config, data, model, trainer.

The loss is −log π(token) in nats, meant over the tokens of the answers in an update, each answer's
end token included. A prompt's tokens do not count, nor do earlier answers in a conversation: what
was judged, and is to be imitated, is the last one. The trainer is TRL's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from training import adapters, models
from training.answers import Answers, best_answers, tokenize
from training.evaluation import implicit_reward_accuracy
from training.loop import Method, train
from training.run import TrainingRuntime
from training.settings import TrainingConfig, training_arguments

__all__ = ["METHOD", "SFTConfig", "build_trainer", "train"]


class SFTConfig(TrainingConfig):
    """What to train and how: everything here changes the result."""

    method: Literal["sft"] = "sft"
    learning_rate: float = Field(1e-4, gt=0)
    """Peak of the schedule: about 1e-5 for full weights, ten times that for adapters."""
    packing: bool = False
    """Lay answers with their prompts side by side in rows of `max_length` tokens, each attending to
    itself alone; `batch_size` then counts rows. Faster where samples are short."""

    @model_validator(mode="after")
    def _can_be_packed(self) -> Self:
        if self.packing and self.batch_tokens is not None:
            raise ValueError(
                "batch_tokens: packed rows are all of max_length tokens; say packing: false, or "
                "leave batch_tokens out"
            )
        if self.packing and self.weights in ("prefix_tuning", "prompt_tuning"):
            raise ValueError(
                f"packing: the virtual tokens of {self.weights} would stand before a row's first "
                "sample only; say packing: false"
            )
        return self


def load_data(
    config: SFTConfig, dataset: Path, tokenizer: Any
) -> tuple[Answers | None, Answers | None]:
    """Training and held-out answers: of preferences or ranked answers, each prompt's best."""
    train, test = (_load_split(config, dataset, tokenizer, split) for split in ("train", "test"))
    return train, test


def _load_split(config: SFTConfig, dataset: Path, tokenizer: Any, split: str) -> Answers | None:
    found = best_answers(dataset, split)
    if found is None:
        return None
    ends = models.end_tokens(config.model, config.revision, tokenizer)
    where = f"{dataset}: {split}"
    return tokenize(*found, tokenizer, ends=ends, max_length=config.max_length, where=where)


def build_trainer(
    config: SFTConfig,
    runtime: TrainingRuntime,
    output: Path,
    answers: Answers,
    held_out: Answers | None,
) -> Any:
    """TRL's trainer for this configuration on the freshly loaded model, with its new adapter on."""
    from trl.trainer.sft_config import SFTConfig as TRLConfig
    from trl.trainer.utils import disable_dropout_in_model

    from training.hooks import report_to
    from training.packing import AnswerTrainer, collator, packed, require_separate

    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    disable_dropout_in_model(model)
    tokenizer = models.load_tokenizer(config.model, config.revision)
    model, adapter = adapters.prepare(model, config, config.gradient_checkpointing)
    rows = scored(answers.rows)
    collate = collator(model.config._attn_implementation, tokenizer.pad_token_id)
    trainer = AnswerTrainer(
        model=model,
        args=TRLConfig(
            **training_arguments(config, runtime, output, evaluate=held_out is not None),
            max_length=None,  # too long answers are gone; TRL would cut off the end token
        ),
        data_collator=collate,
        train_dataset=packed(rows, config.max_length) if config.packing else rows,
        eval_dataset=scored(held_out.rows) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.batch_tokens = config.batch_tokens
    adapters.keep_in_float32(trainer.model)
    if config.packing:
        require_separate(trainer.model, collate, bf16=config.dtype == "bfloat16")
    report_to(trainer, runtime.report_to, output)
    return trainer


def scored(rows: Any) -> Any:
    """Rows of `input_ids` and `labels`, in which only the answer's tokens are not -100."""
    import datasets

    columns = list(zip(rows["prompt_ids"], rows["answer_ids"], strict=True))
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[*prompt, *answer] for prompt, answer in columns],
            "labels": [[*[-100] * len(prompt), *answer] for prompt, answer in columns],
        }
    )


METHOD = Method(
    load_data,
    build_trainer,
    implicit_reward_accuracy,
    unit="answers",
    accuracy="eval_mean_token_accuracy",
)
