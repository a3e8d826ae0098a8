"""Low-rank adapters (LoRA, Hu et al. 2021) on a frozen base. With the adapter off, the base is the
reference, so no second model is held."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from preferences.config import Config
from preferences.errors import InputError


class LoraConfig(Config):
    """A low-rank update of some linear layers."""

    rank: int = Field(16, ge=1)
    """Rank of the update; trainable weights grow with it."""
    alpha: float = Field(32.0, gt=0)
    """The update is multiplied by alpha/rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the update's inputs dropped in training; the base model's own dropout stays off."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers to adapt, as ("q_proj", "v_proj"), or all linear ones but the head."""

    @field_validator("target_modules")
    @classmethod
    def _not_the_head(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if "lm_head" in value:
            # TRL multiplies with the head's weight itself, past any adapter.
            raise ValueError("an adapter on lm_head would never be trained; leave it out")
        if not value:
            raise ValueError("no layers named; name some, or say all-linear")
        return value


def peft_config(lora: LoraConfig) -> Any:
    """The same for peft, for a causal language model."""
    import peft

    target = lora.target_modules
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by the rank: any number
        lora_dropout=lora.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        bias="none",
        task_type="CAUSAL_LM",
    )


def target_layers(model: Any, lora: LoraConfig) -> list[str]:
    """Full names of the layers the adapter will sit on; InputError where a name fits none."""
    import torch

    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    if lora.target_modules == "all-linear":
        return linear
    wanted = lora.target_modules
    unknown = [n for n in wanted if not any(f".{full}".endswith(f".{n}") for full in linear)]
    if unknown:
        known = sorted({full.rsplit(".", 1)[-1] for full in linear})
        raise InputError(
            f"lora.target_modules: the model has no linear layer {unknown[0]!r}; it has "
            f"{', '.join(known)}"
        )
    return [full for full in linear if any(f".{full}".endswith(f".{n}") for n in wanted)]
