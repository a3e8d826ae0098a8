"""Odds ratio preference optimisation (Hong et al. 2024), top to bottom: config, data, model,
trainer.

It needs no reference: the loss of a pair is −log π̄(chosen) − λ·log σ(log odds(chosen) −
log odds(rejected)), where log π̄ is an answer's log-probability divided by its number of tokens, end
token included, and odds(y) = π̄/(1 − π̄) (eq. 1 to 7). Only tokens of the chosen answer count in the
first term; TRL's counts the prompt's too, which teaches to write prompts and makes the loss depend
on how long they are. `training.odds_ratio` has the loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from preferences.errors import InputError
from training import adapters, models
from training.data import Pairs, load_pairs
from training.evaluation import implicit_reward_accuracy
from training.loop import Method, train
from training.run import TrainingRuntime
from training.settings import TrainingConfig, training_arguments

__all__ = ["METHOD", "ORPOConfig", "build_trainer", "train"]


class ORPOConfig(TrainingConfig):
    """What to train and how: everything here changes the result."""

    method: Literal["orpo"] = "orpo"
    odds_ratio_weight: float = Field(0.1, ge=0)
    """λ: what the odds ratio counts for beside the likelihood of the chosen answer, usually 0.05 to
    1; with 0 it is fine-tuning on the chosen answers."""


def load_data(
    config: ORPOConfig, dataset: Path, tokenizer: Any
) -> tuple[Pairs | None, Pairs | None]:
    """Training and held-out pairs."""
    ends = models.end_tokens(config.model, config.revision, tokenizer)
    train, test = (
        load_pairs(dataset, split, tokenizer, ends=ends, max_length=config.max_length)
        for split in ("train", "test")
    )
    for pairs in (train, test):
        if pairs is not None:
            _require_tokens(pairs)
    return train, test


def build_trainer(
    config: ORPOConfig,
    runtime: TrainingRuntime,
    output: Path,
    pairs: Pairs,
    held_out: Pairs | None,
) -> Any:
    """The trainer for this configuration on the freshly loaded model, with its new adapter on."""
    from trl.trainer.sft_config import SFTConfig as TRLConfig
    from trl.trainer.utils import disable_dropout_in_model

    from training.hooks import report_to
    from training.odds_ratio import OddsRatioTrainer, PairCollator

    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    disable_dropout_in_model(model)
    tokenizer = models.load_tokenizer(config.model, config.revision)
    model, adapter = adapters.prepare(model, config, config.gradient_checkpointing)
    trainer = OddsRatioTrainer(
        model=model,
        args=TRLConfig(
            **training_arguments(config, runtime, output, evaluate=held_out is not None),
            max_length=None,  # too long pairs are gone; TRL would cut off the end token
        ),
        data_collator=PairCollator(tokenizer.pad_token_id),
        train_dataset=pairs.rows,
        eval_dataset=held_out.rows if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
        weight=config.odds_ratio_weight,
    )
    trainer.batch_tokens = config.batch_tokens
    adapters.keep_in_float32(trainer.model)
    report_to(trainer, runtime.report_to, output)
    return trainer


def _require_tokens(pairs: Pairs) -> None:
    for row in pairs.rows:
        if not row["chosen_ids"] or not row["rejected_ids"]:
            raise InputError(
                f"prompt {row['prompt_id']}: an answer has no tokens, so ORPO has no mean over "
                "them; remove the pair, or use a chat template that ends answers with a token"
            )


METHOD = Method(load_data, build_trainer, implicit_reward_accuracy)
