"""Reward models from pairs (Christiano et al. 2017; Ouyang et al. 2022), top to bottom: config,
data, model, trainer, and what the result is worth.

A reward model gives a conversation one number, read at its last answer's end token, so that the
chosen answer beats the rejected one with probability σ(r_c − r_r): Bradley and Terry's model. The
loss is in `training.reward_trainer`, the head and its publication in `training.reward_head`.

A run leaves `adapter` or, with full weights, `model`; `publish_reward_model` makes a `model` of an
adapter. That is what a judge of kind `reward_model` and transformers'
`AutoModelForSequenceClassification` read; PPO puts the adapter beside its own on one base
(`training.reward_head.add_adapter`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from preferences.errors import InputError
from preferences.estimate import Estimate
from training import adapters, models
from training.data import Balance, Labels, Pairs, labelled_rows, load_pairs, with_margins
from training.evaluation import clustered_share
from training.loop import Method, train
from training.run import TrainingRuntime
from training.settings import TrainingConfig, training_arguments

__all__ = ["METHOD", "RewardConfig", "publish_reward_model", "train"]

WITH_HEAD = ("full", "lora", "dora", "qlora", "qdora")
"""Weights beside which a head can train and be saved."""

BINS = 10
"""Of the calibration: from a probability of 1/2 to 1, equally wide."""


class RewardConfig(TrainingConfig):
    """What to train and how: everything here changes the result."""

    method: Literal["reward"] = "reward"
    learning_rate: float = Field(1e-4, gt=0)
    """Peak of the schedule: about 1e-5 for full weights, ten times that for adapters."""
    labels: Labels = "hard"
    """What a pair's label counts for: `hard`, the truth; `soft`, as much as the pair's probability
    p, by the loss −p·log σ(z) − (1 − p)·log σ(−z) with z = r_c − r_r − margin."""
    balance: Balance = "pairs"
    """What counts alike: every pair, or every prompt, whose pairs then share its weight."""
    margin: float = Field(0.0, ge=0)
    """By how much of the pair's own margin, a difference of qualities in logits, the rewards have
    to differ before the pair counts as even; 0 looks at no margins."""
    centring: float = Field(0.01, ge=0)
    """Weight λ of λ·(r_c + r_r)² in the loss, which keeps rewards around 0; they differ only by a
    constant otherwise, and PPO has to know which."""
    packing: bool = True
    """Put several answers into a row: the same rewards with less padding. Where that is exact, all
    of a batch stand in one, behind prompts that their pairs share; otherwise as many as there is
    room for, each blind to the others, and a model that cannot is refused before training."""
    probe: None = None
    """A reward model answers nothing, so nothing is sampled."""

    @model_validator(mode="after")
    def _weights_with_a_head(self) -> Self:
        if self.weights not in WITH_HEAD:
            raise ValueError(
                f"weights: {self.weights} cannot carry a reward head; say one of "
                f"{', '.join(WITH_HEAD)}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs that the model is about equally sure of."""

    pairs: int
    predicted: float
    """Mean probability of the answer with the larger reward."""
    seen: float
    """Share of them whose label says so too."""


@dataclass(frozen=True, slots=True)
class RewardEvaluation:
    """What a reward model is worth on held-out pairs.

    With hard labels the chosen answer is better; with soft ones it is so with the pair's
    probability, and a share counts that much of each pair. No model can be more accurate than the
    labels are sure: `bayes` is what the one with the labels' own odds would reach.
    """

    pairs: int
    prompts: int
    accuracy: Estimate
    """How often the better answer has the larger reward; a tie counts half."""
    bayes: float
    longer_wins: Estimate
    """The same by the rule that the answer with more tokens is better."""
    nll: float
    """Mean −log of the probability given to the label, in nats; a coin's is 0.693."""
    ece: float
    """Mean distance of predicted and seen over the bins, by their pairs."""
    bins: tuple[Bin, ...]
    """Those that have pairs, from unsure to sure."""
    mean_reward: float
    """Over all answers, chosen and rejected."""
    reward_deviation: float
    """Standard deviation over all answers."""


def load_data(
    config: RewardConfig, dataset: Path, tokenizer: Any
) -> tuple[Pairs | None, Pairs | None]:
    """Training and held-out pairs, with their `margin`.

    The tokenizer is made such that what it renders ends with the end token, see `make_closed`.
    """
    train_pairs, held_out = (
        _load_split(config, dataset, split, tokenizer) for split in ("train", "test")
    )
    return train_pairs, held_out


def _load_split(config: RewardConfig, dataset: Path, split: str, tokenizer: Any) -> Pairs | None:
    from training.reward_head import make_closed

    ends = models.end_tokens(config.model, config.revision, tokenizer)
    make_closed(tokenizer, ends)
    pairs = load_pairs(dataset, split, tokenizer, ends=ends, max_length=config.max_length)
    if pairs is None:
        return None
    return with_margins(pairs, dataset, split, config.margin)


def build_trainer(
    config: RewardConfig,
    runtime: TrainingRuntime,
    output: Path,
    pairs: Pairs,
    held_out: Pairs | None,
) -> Any:
    """TRL's trainer for this configuration on the freshly loaded model, with its new head on."""
    from trl.trainer.reward_config import RewardConfig as TRLConfig
    from trl.trainer.utils import disable_dropout_in_model

    from training import reward_head
    from training.hooks import report_to
    from training.reward_trainer import PairRewardTrainer, collator

    def rows(split: Pairs) -> Any:
        return labelled_rows(split, config.labels, config.balance)

    train_rows, held_out_rows = rows(pairs), rows(held_out) if held_out else None
    model = reward_head.load(
        config.model, config.revision, config.weights, config.dtype, config.seed
    )
    disable_dropout_in_model(model)
    # Only the body is adapted, and quantised; the head trains as a whole beside it.
    _, adapter = adapters.prepare(model.base_model, config, config.gradient_checkpointing)
    if adapter is not None:
        adapter.task_type = "SEQ_CLS"
    reward_head.read_at_ends(model, config.packing)
    tokenizer = models.load_tokenizer(config.model, config.revision)
    reward_head.make_closed(tokenizer, models.end_tokens(config.model, config.revision, tokenizer))
    trainer = PairRewardTrainer(
        model=model,
        args=TRLConfig(
            **training_arguments(config, runtime, output, evaluate=held_out is not None),
            max_length=None,  # too long pairs are gone
            disable_dropout=False,  # done on the base model; TRL would disable the adapter's too
        ),
        data_collator=collator(config.packing, reward_head.row_width(model)),
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.centring, trainer.batch_tokens = config.centring, config.batch_tokens
    adapters.keep_in_float32(trainer.model)
    if config.packing and not trainer.share():
        some = train_rows.select(range(min(4, len(train_rows))))
        answers = [row["prompt_ids"] + row["chosen_ids"] for row in some]
        reward_head.require_exact(trainer.model, answers, config.dtype)
    report_to(trainer, runtime.report_to, output)
    return trainer


def publish_reward_model(config: RewardConfig, output: Path) -> Path:
    """The folder with the finished run's reward model as one model; made of its adapter if there is
    none yet."""
    from training import reward_head

    folder = output / "model"
    if not folder.exists():
        with models.quiet_libraries():
            reward_head.publish(
                config.model,
                config.revision,
                config.weights,
                config.dtype,
                output / models.saved_folder(config.weights),
                folder,
            )
    return folder


def held_out_accuracy(
    config: RewardConfig, output: Path, dataset: Path, split: str = "test", batch_size: int = 8
) -> RewardEvaluation:
    """Score the published model of a finished run on a split of `dataset`."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from training import reward_head

    folder = publish_reward_model(config, output)
    pairs = _load_split(config, dataset, split, AutoTokenizer.from_pretrained(folder))
    if pairs is None:
        raise InputError(f"{dataset}: no data/{split}-*.parquet in it; name another split")
    sequences = [
        row["prompt_ids"] + row[f"{answer}_ids"]
        for row in pairs.rows
        for answer in ("chosen", "rejected")
    ]
    with models.quiet_libraries():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        reward_head.read_at_ends(model, packing=False)
        found = reward_head.rewards(
            model.to("cuda" if torch.cuda.is_available() else "cpu"), sequences, batch_size
        )
    lengths = [float(len(row)) for row in sequences]
    labels = labelled_rows(pairs, config.labels, "pairs")["probability"]
    return reward_evaluation(found, list(labels), list(pairs.rows["prompt_id"]), lengths)


def reward_evaluation(
    rewards: Sequence[float],
    labels: Sequence[float],
    prompt_ids: Sequence[str],
    lengths: Sequence[float],
) -> RewardEvaluation:
    """What rewards are worth.

    `rewards` and `lengths` go chosen, rejected, chosen, …; `labels` has P(chosen is better) and
    `prompt_ids` the prompt of every pair.
    """
    gaps = [chosen - rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]
    longer = [
        chosen - rejected for chosen, rejected in zip(lengths[::2], lengths[1::2], strict=True)
    ]
    bins = _bins(gaps, labels)
    mean = math.fsum(rewards) / len(rewards)
    return RewardEvaluation(
        pairs=len(gaps),
        prompts=len(set(prompt_ids)),
        accuracy=clustered_share(_shares(gaps, labels), prompt_ids),
        bayes=math.fsum(max(p, 1 - p) for p in labels) / len(labels),
        longer_wins=clustered_share(_shares(longer, labels), prompt_ids),
        nll=math.fsum(
            p * _softplus(-gap) + (1 - p) * _softplus(gap)
            for gap, p in zip(gaps, labels, strict=True)
        )
        / len(gaps),
        ece=math.fsum(b.pairs * abs(b.predicted - b.seen) for b in bins) / len(gaps),
        bins=bins,
        mean_reward=mean,
        reward_deviation=math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards)),
    )


def _shares(gaps: Sequence[float], labels: Sequence[float]) -> list[float]:
    """Of each pair, how much of its label agrees with the sign of the gap; half for a tie."""
    return [
        p if gap > 0 else 1 - p if gap < 0 else 0.5 for gap, p in zip(gaps, labels, strict=True)
    ]


def _bins(gaps: Sequence[float], labels: Sequence[float]) -> tuple[Bin, ...]:
    gathered: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for gap, seen in zip(gaps, _shares(gaps, labels), strict=True):
        sure = math.exp(-_softplus(-abs(gap)))
        gathered[min(int((2 * sure - 1) * BINS), BINS - 1)].append((sure, seen))
    return tuple(
        Bin(
            len(pairs),
            math.fsum(sure for sure, _ in pairs) / len(pairs),
            math.fsum(seen for _, seen in pairs) / len(pairs),
        )
        for pairs in gathered
        if pairs
    )


def _softplus(x: float) -> float:
    """log(1 + e^x) = −log σ(−x), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


METHOD = Method(load_data, build_trainer, held_out_accuracy)
