"""What a recipe says of measuring its model: against which, on what, and when rounds end."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from generation.engine import Sampling
from generation.prompts import PromptsConfig
from preferences.config import Config


class KLReference(Config):
    """The model that the trained one's distance is measured from."""

    model: str
    """A folder with weights or a Hub id, with the trained model's tokens."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""


class EvaluationConfig(Config):
    """How the aligned model is compared with the one that its first step, or without steps the
    alignment, started from."""

    prompts: PromptsConfig | None = None
    """Prompts to answer; by default the dataset's held-out ones."""
    engine: Annotated[str, Field(pattern="^(vllm|transformers)$")] = "vllm"
    """What answers them; transformers by itself for weights that cannot be merged."""
    samples: int = Field(1, ge=1)
    """Answers to each prompt, of each of the two models."""
    sampling: Sampling = Sampling()
    """How they are drawn. The KL is measured on answers drawn from the whole distribution: at a
    temperature above 0, with top_p 1 and no stop texts."""
    seed: int = 0
    """Another seed, other answers."""
    judge: str | None = None
    """Who compares the answers: the name of one of the recipe's judges, by default the first that
    can be asked."""
    checks: dict[str, str] = Field(default_factory=dict)
    """Functions that score an answer, as `name: package.module:function` or `file.py:function`;
    their means before and after are reported."""
    kl_reference: KLReference | None = None
    """What the KL is measured from; by default the model that it is compared with."""

    @property
    def measures_kl(self) -> bool:
        """Whether its answers are drawn from the whole distribution, so that they can tell."""
        drawn = self.sampling
        return drawn.temperature > 0 and drawn.top_p == 1 and not drawn.stop


class RoundsConfig(Config):
    """When `pairwright iterate` ends."""

    most: int = Field(3, ge=1)
    """Rounds at most."""
    max_kl: float | None = Field(None, gt=0)
    """The farthest that a round may get from the first policy: KL on held-out prompts, in nats an
    answer. A round that passes it is the last and is not kept."""
    patience: int = Field(1, ge=1)
    """So many rounds in a row without a gain end it: a gain is a win rate against the round's own
    start whose 95 % interval lies above one half. A round after one without a gain starts where
    that one did, with another seed."""

    def check(self, evaluation: EvaluationConfig, judged: bool) -> None:
        """Raises ValueError where an evaluation will not tell what these limits look at."""
        if not judged:
            raise ValueError(
                "rounds: none of the judges can be asked about new answers, so no win rate is "
                "measured; add one that can"
            )
        if self.max_kl is not None and not evaluation.measures_kl:
            raise ValueError(
                "rounds.max_kl: the KL is measured on answers drawn from the whole distribution; "
                "give evaluation.sampling a temperature above 0, top_p 1 and no stop texts"
            )
