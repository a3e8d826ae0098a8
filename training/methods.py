"""The training methods there are: the one place that knows them all."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from training import dpo, group_relative, kto, orpo, ppo, pretraining, ranked, reward, sft
from training.dpo import DPOConfig
from training.group_relative import GRPOConfig, RLOOConfig
from training.kto import KTOConfig
from training.loop import Method
from training.orpo import ORPOConfig
from training.ppo import PPOConfig
from training.pretraining import PretrainingConfig
from training.ranked import RankedDPOConfig
from training.reward import RewardConfig
from training.settings import TrainingConfig
from training.sft import SFTConfig

METHODS = {
    "dpo": dpo.METHOD,
    "grpo": group_relative.METHOD,
    "kto": kto.METHOD,
    "orpo": orpo.METHOD,
    "ppo": ppo.METHOD,
    "pretraining": pretraining.METHOD,
    "ranked_dpo": ranked.METHOD,
    "reward": reward.METHOD,
    "rloo": group_relative.METHOD,
    "sft": sft.METHOD,
}
"""What each does, by its name."""


def _method_named(value: Any) -> str:
    """The method a configuration is of, read from a recipe or made; DPO where none is named."""
    found = value.get("method", "dpo") if isinstance(value, dict) else getattr(value, "method", "")
    return str(found)


Alignment = Annotated[
    Annotated[DPOConfig, Tag("dpo")]
    | Annotated[GRPOConfig, Tag("grpo")]
    | Annotated[KTOConfig, Tag("kto")]
    | Annotated[ORPOConfig, Tag("orpo")]
    | Annotated[PPOConfig, Tag("ppo")]
    | Annotated[PretrainingConfig, Tag("pretraining")]
    | Annotated[RankedDPOConfig, Tag("ranked_dpo")]
    | Annotated[RewardConfig, Tag("reward")]
    | Annotated[RLOOConfig, Tag("rloo")]
    | Annotated[SFTConfig, Tag("sft")],
    Discriminator(_method_named),
]
"""The configuration of any of them, told apart by `method`."""


def method_of(config: TrainingConfig) -> Method:
    """How a configuration is trained."""
    return METHODS[config.method]
