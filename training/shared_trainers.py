"""TRL's trainers of pairs and of likes, with the forward pass of `training.shared_prefix`.

This module imports trl at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from training.batches import TokenBatches
from training.labels import LabelledPairTrainer, PairTrainer
from training.likes import LikesTrainer
from training.reference import CachedReference
from training.shared_prefix import SharedPrefix


class SharedPairTrainer(TokenBatches, SharedPrefix, PairTrainer):
    """Both answers behind one prompt."""


class SharedLabelledPairTrainer(TokenBatches, SharedPrefix, LabelledPairTrainer):
    """The same for pairs that have a probability, a weight and a margin each."""


class SharedLikesTrainer(TokenBatches, SharedPrefix, CachedReference, LikesTrainer):
    """Each answer behind its own prompt, without padding."""

    answers = 1
    by_length = False
