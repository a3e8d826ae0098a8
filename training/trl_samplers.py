"""TRL's trainers that sample, without vLLM.

TRL 1.16 imports vLLM wherever it is installed, which takes seconds and memory, and fails with
versions that TRL does not know. Here answers come from elsewhere. This module imports trl at its
head, so it is imported inside functions only.
"""

from __future__ import annotations

from unittest import mock

with mock.patch("trl.import_utils.is_vllm_available", return_value=False):
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

__all__ = ["GRPOTrainer", "RLOOTrainer"]
