"""Direct preference optimisation on ranked lists (Rafailov et al. 2023), top to bottom: config,
data, model, trainer.

A prompt's K ranked answers stand behind it once, and each is computed once, where K·(K − 1)/2 pairs
would compute it K − 1 times. With r = log π(answer) − log π_ref(answer), summed over the answer's
tokens and its end token, the loss of a list is the mean of its pairs' DPO losses, as reward models
are trained on rankings (Ouyang et al. 2022, eq. 1), or −log of the probability that Plackett and
Luce give to the ranking, with scores β·r (Rafailov et al. 2023, eq. 20). Every prompt counts alike.
The trainer is TRL's, with the forward pass of `training.shared_prefix`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from preferences.errors import InputError
from training import adapters, models
from training.data import Labels, require_probability
from training.evaluation import implicit_reward_accuracy
from training.loop import Method, train
from training.ranked_lists import Lists, load_lists
from training.run import TrainingRuntime
from training.settings import TrainingConfig, training_arguments

__all__ = ["METHOD", "RankedDPOConfig", "build_trainer", "train"]

Loss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "discopop",
    "plackett_luce",
]

SOFT = ("sigmoid", "sigmoid_norm", "ipo")
SMOOTHED = (*SOFT, "robust", "exo_pair")
WITH_MARGIN = ("sigmoid", "sigmoid_norm", "hinge")


class RankedDPOConfig(TrainingConfig):
    """What to train and how: everything here changes the result."""

    method: Literal["ranked_dpo"] = "ranked_dpo"
    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the reference, usually 0.01 to 0.5; a small one goes further and
    breaks sooner. As in `dpo`, 2 to 10 with `sigmoid_norm`, and the paper's τ with `ipo`."""
    loss: Loss = "sigmoid"
    """What is made small: `plackett_luce`, −log of the probability of the whole ranking; any other,
    the mean over the list's pairs of that loss of `dpo`. Those that look at one answer's gain by
    itself, or at a sorted batch, are no losses of a list: a middle answer is chosen in one pair and
    rejected in the next."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share ε of the pairs that are the wrong way round, below 1/2; `robust` and `exo_pair` need
    one, of about 0.1 and 0.001."""
    labels: Labels = "hard"
    """What a pair's label counts for: `hard`, the truth; `soft`, as much as its probability."""
    margin: float = Field(0.0, ge=0)
    """By how much of the pair's own margin, a difference of qualities in logits, β·Δ has to differ
    before the pair counts as even (Amini et al. 2024); 0 looks at no margins."""

    @model_validator(mode="after")
    def _fits_its_loss(self) -> Self:
        for key, given, known in (
            ("labels: soft", self.labels == "soft", SOFT),
            ("label_smoothing", self.label_smoothing > 0, SMOOTHED),
            ("margin", self.margin > 0, WITH_MARGIN),
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
        return self


def load_data(
    config: RankedDPOConfig, dataset: Path, tokenizer: Any
) -> tuple[Lists | None, Lists | None]:
    """Training and held-out lists, with what the loss takes their pairs' labels for."""
    train = _load_split(config, dataset, tokenizer, "train")
    if train is not None and train.longest < 3:
        raise InputError(
            f"{dataset}: no prompt has three ranked answers or more, its pairs are all there is; "
            "say pairs.policy: all_pairs in the dataset's recipe, or train with method: dpo"
        )
    return train, _load_split(config, dataset, tokenizer, "test")


def _load_split(config: RankedDPOConfig, dataset: Path, tokenizer: Any, split: str) -> Lists | None:
    lists = load_lists(
        dataset,
        split,
        tokenizer,
        ends=models.end_tokens(config.model, config.revision, tokenizer),
        max_length=config.max_length,
        margins=config.margin > 0,
        rankable=config.loss == "plackett_luce",
    )
    return lists and _labelled(config, lists)


def _labelled(config: RankedDPOConfig, lists: Lists) -> Lists:
    """With the probability and the margin that the loss takes each pair to have."""
    sure: list[list[float]] = list(lists.rows["probability"])
    if config.labels == "hard":
        sure = [[1 - config.label_smoothing] * len(pairs) for pairs in sure]
    for prompt_id, pairs in zip(lists.rows["prompt_id"], sure, strict=True):
        for probability in pairs:
            require_probability(prompt_id, probability)
    apart = [[config.margin * margin for margin in pairs] for pairs in lists.rows["margin"]]
    rows = lists.rows.remove_columns(["probability", "margin"])
    rows = rows.add_column("probability", sure).add_column("margin", apart)
    return dataclasses.replace(lists, rows=rows)


def build_trainer(
    config: RankedDPOConfig,
    runtime: TrainingRuntime,
    output: Path,
    lists: Lists,
    held_out: Lists | None,
) -> Any:
    """The trainer for this configuration on the freshly loaded model, with its new adapter on."""
    from trl.trainer.dpo_config import DPOConfig as TRLConfig
    from trl.trainer.utils import disable_dropout_in_model

    from training.hooks import report_to
    from training.ranked_trainer import RankedTrainer
    from training.reference import beforehand

    model = models.load_model(config.model, config.revision, config.weights, config.dtype)
    disable_dropout_in_model(model)
    model, adapter = adapters.prepare(model, config, config.gradient_checkpointing)
    trainer = RankedTrainer(
        config.loss,
        max(split.longest for split in (lists, held_out) if split is not None),
        model=model,
        args=TRLConfig(
            **training_arguments(config, runtime, output, evaluate=held_out is not None),
            beta=config.beta,
            max_length=None,  # too long answers are gone; TRL would cut off the end token
            disable_dropout=False,  # done on the base model; TRL would disable the adapter's too
            precompute_ref_log_probs=beforehand(config, len(lists.rows)),
        ),
        train_dataset=lists.rows,
        eval_dataset=held_out.rows if held_out else None,
        processing_class=models.load_tokenizer(config.model, config.revision),
        # The configuration, not a ready adapter: for that TRL would add a second one as reference.
        peft_config=adapter,
    )
    trainer.batch_tokens = config.batch_tokens
    adapters.keep_in_float32(trainer.model)
    report_to(trainer, runtime.report_to, output)
    return trainer


METHOD = Method(load_data, build_trainer, implicit_reward_accuracy, unit="prompts")
