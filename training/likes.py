"""KTO's trainer. This module imports trl at its head, so it is imported inside functions only."""

from __future__ import annotations

from typing import Any

from trl.trainer.kto_trainer import KTOTrainer

from training.hooks import Tokenized


class LikesTrainer(Tokenized, KTOTrainer):
    """KTOTrainer on answers that are tokens already, each with an answer to another prompt.

    TRL makes those others of the batch's neighbours, which for a preference dataset answer the same
    prompt, and therefore has every epoch go through the same batches in the order of the file. With
    the others fixed beforehand, batches are drawn at random, as in any other training.
    """

    train_dataset: Any

    def __init__(self, *args: Any, **values: Any) -> None:
        values["args"].train_sampling_strategy = "sequential"
        super().__init__(*args, **values)
        self.args.train_sampling_strategy = "random"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With how many likes and dislikes there are and what each counts for."""
        if "loss" in logs:
            likes = sum(self.train_dataset["label"])
            logs |= {
                "likes": likes,
                "dislikes": len(self.train_dataset) - likes,
                "weights/liked": self.desirable_weight,
                "weights/disliked": self.undesirable_weight,
            }
        super().log(logs, start_time)
