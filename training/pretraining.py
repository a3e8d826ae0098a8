"""Continual pre-training on plain texts (Ibrahim et al. 2024, "Simple and scalable strategies to
continually pre-train large language models"), top to bottom: config, data, model, trainer, and what
was learnt and forgotten.

A model whose learning rate has gone down learns new texts only if it goes up again, and then
forgets old ones. So the rate is warmed up to its peak and decays anew, and among the new texts a
few of the old ones are replayed. The loss is −log π(token), in nats, over all tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from preferences.config import Config
from preferences.errors import InputError
from training import adapters, models
from training.loop import Method, train
from training.models import Weights
from training.run import TrainingRuntime, write_json
from training.saved_adapters import load_trained
from training.settings import TrainingConfig, training_arguments
from training.texts import Blocks, gather_texts, load_blocks

__all__ = ["METHOD", "PretrainingConfig", "build_trainer", "train"]


class TextsConfig(Config):
    """Tables of plain texts: JSON Lines, CSV or Parquet, gzipped or not, or Hub data sets."""

    new: tuple[str, ...] = Field(min_length=1)
    """Those to learn."""
    old: tuple[str, ...] = ()
    """Texts like those that the model was trained on before, for `replay`."""
    column: str = "text"
    """Where the text stands in a row of them."""
    held_out: float = Field(0.01, ge=0, lt=1)
    """Share of the texts that are not trained on and show what was learnt and forgotten."""


class PretrainingConfig(TrainingConfig):
    """What to train and how: everything here changes the result."""

    method: Literal["pretraining"] = "pretraining"
    weights: Weights = "full"
    """What trains, as for the other methods; new knowledge wants all weights, or a high rank."""
    learning_rate: float = Field(3e-5, gt=0)
    """Peak of the schedule: about a tenth of what the model was first trained with, or all of it
    for texts that are very unlike; ten times as high for adapters."""
    schedule: Literal["cosine"] = "cosine"
    """From the peak in half a cosine to `final_rate`."""
    warmup_share: float = Field(0.01, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0 to its peak."""
    final_rate: float = Field(0.1, ge=0, le=1)
    """Where the learning rate ends, as a share of its peak; above 0, training can go on later."""
    replay: float = Field(0.05, ge=0, lt=1)
    """Share of old texts among what is trained on, counted in blocks; they are those with the
    origin `old`. More for new texts that are very unlike: up to a half."""
    max_length: int = Field(1024, ge=2)
    """Tokens of a block. Texts stand in them one after the other, an end token behind each."""
    texts: TextsConfig | None = None
    """What to train on; without it, the dataset that training is given holds texts."""
    batch_tokens: None = None
    """Blocks are of one length, so `batch_size` says it."""
    probe: None = None
    """Nothing is asked, so nothing is sampled."""

    @model_validator(mode="after")
    def _texts_to_replay(self) -> Self:
        if self.texts is not None and self.replay and not self.texts.old:
            raise ValueError(
                f"replay: {self.replay} of what is trained on are old texts and there are none; "
                "name some as texts.old, or say replay: 0"
            )
        return self

    @model_validator(mode="after")
    def _weights_that_hold_texts(self) -> Self:
        if self.weights in ("prefix_tuning", "prompt_tuning"):
            raise ValueError(
                f"weights: {self.weights} steers a model and cannot hold new texts; say full or "
                "lora"
            )
        return self


@dataclass(frozen=True, slots=True)
class TextLoss:
    """Mean −log π(token) on held-out texts of one origin, in nats."""

    tokens: int
    before: float
    """Of the model that training started from."""
    after: float


@dataclass(frozen=True, slots=True)
class PretrainingEvaluation:
    """What was learnt, on new texts, and forgotten, on old ones; None where none are held out."""

    new: TextLoss | None
    old: TextLoss | None


@contextmanager
def gathered(texts: TextsConfig) -> Iterator[Path]:
    """The texts as one dataset, in a folder that is there while the block lasts.

    The same texts give the same bytes, so a run that is resumed finds its own dataset again.
    """
    with TemporaryDirectory(prefix="pairwright-") as folder:
        held_out, column = texts.held_out, texts.column
        gather_texts(texts.new, texts.old, Path(folder), column=column, held_out=held_out)
        yield Path(folder)


def load_data(
    config: PretrainingConfig, dataset: Path, tokenizer: Any
) -> tuple[Blocks | None, Blocks | None]:
    """Blocks to train on, with their share of old ones, and all that are held out."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"{config.model}: its tokenizer has no end token to part texts by")
    learnt, held_out = (
        load_blocks(
            dataset,
            split,
            tokenizer,
            length=config.max_length,
            replay=config.replay if split == "train" else None,
            seed=config.seed,
        )
        for split in ("train", "test")
    )
    return learnt, held_out


def build_trainer(
    config: PretrainingConfig,
    runtime: TrainingRuntime,
    output: Path,
    blocks: Blocks,
    held_out: Blocks | None,
) -> Any:
    """transformers' trainer for this configuration on the freshly loaded model, with what trains on
    it; what became of the texts goes to `blocks.json`."""
    from transformers import TrainingArguments, set_seed
    from trl.trainer.utils import disable_dropout_in_model

    from training.hooks import report_to
    from training.text_trainer import TextTrainer, collate

    splits = {"train": blocks} | ({"test": held_out} if held_out else {})
    counts = {name: dataclasses.asdict(split.block_counts) for name, split in splits.items()}
    write_json(output / "blocks.json", counts)
    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    disable_dropout_in_model(model)
    set_seed(config.seed)  # of the adapter's start
    model = adapters.put_on(model, config, config.gradient_checkpointing)
    if config.gradient_checkpointing and models.has_adapter(config.weights):
        model.enable_input_require_grads()  # else a frozen embedding ends the backward pass
    arguments = training_arguments(config, runtime, output, evaluate=held_out is not None)
    arguments |= {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": config.final_rate},
        "prediction_loss_only": True,
        "remove_unused_columns": False,  # the origin of a block is not the model's business
    }
    trainer = TextTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        data_collator=collate,
        train_dataset=blocks.rows,
        eval_dataset=held_out.rows if held_out else None,
        processing_class=models.load_tokenizer(config.model, config.revision, chats=False),
    )
    report_to(trainer, runtime.report_to, output)
    return trainer


def learnt_and_forgotten(
    config: PretrainingConfig, output: Path, dataset: Path, split: str = "test", batch_size: int = 8
) -> PretrainingEvaluation:
    """Losses on a split of `dataset` before training and with the weights that a finished run left
    in `output`."""
    import torch

    from training.text_trainer import text_losses

    tokenizer = models.load_tokenizer(config.model, config.revision, chats=False)
    length, seed = config.max_length, config.seed
    held_out = load_blocks(dataset, split, tokenizer, length=length, replay=None, seed=seed)
    if held_out is None:
        return PretrainingEvaluation(None, None)
    bf16 = config.dtype == "bfloat16"
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def losses(model: Any) -> Any:
        return text_losses(model.to(device), held_out.rows, batch_size, bf16)

    with models.quiet_libraries():
        base = models.load_model(config.model, config.revision, config.weights, config.dtype)
        before = losses(base)
        if config.weights == "full":
            del base
            saved = models.load_model(str(output / "model"), None, "full", config.dtype)
        else:
            saved = load_trained(base, output / "adapter")
        after = losses(saved)
    found = [
        TextLoss(int(tokens), float(was) / int(tokens), float(now) / int(tokens))
        if tokens
        else None
        for (was, tokens), (now, _) in zip(before.tolist(), after.tolist(), strict=True)
    ]
    return PretrainingEvaluation(*found)


METHOD = Method(
    load_data, build_trainer, learnt_and_forgotten, unit="blocks", accuracy=None, chats=False
)
