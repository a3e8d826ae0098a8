"""Which weights train. With an adapter the base is frozen, and with the adapter off it is the
reference, so no second model is held.

| weights | what trains | starts as the base |
|---|---|---|
| `lora` | B·A beside linear layers (Hu et al. 2021) | yes |
| `dora` | the same, and the length of each of their outputs' weights (Liu et al. 2024) | yes |
| `qlora`, `qdora` | the same on a base in 4 bits (Dettmers et al. 2023) | yes |
| `ia3` | factors of keys, values and inner activations (Liu et al. 2022) | yes |
| `bottleneck` | small networks behind the sublayers (Houlsby et al. 2019) | yes |
| `prefix_tuning` | keys and values before the first token (Li and Liang 2021) | no |
| `prompt_tuning` | embeddings before the first token (Lester et al. 2021) | no |
| `ln_tuning` | the normalisation layers (Zhao et al. 2023) | yes |
| `bitfit` | the biases there are, without an adapter (Ben Zaken et al. 2022) | yes |
| `full` | everything, without an adapter | yes |
"""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from preferences.config import Config
from preferences.errors import InputError
from training.models import Weights, is_quantised

ATTENTION_OUT = ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense")
"""Names of the layers that attention ends with, in the models that people train."""
FEED_FORWARD_OUT = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h")
"""The same of the feed-forward layer."""
NOT_MERGED = {
    "prefix_tuning": "a prefix is keys and values, not weights",
    "prompt_tuning": "virtual tokens are inputs, not weights",
    "bottleneck": "bottleneck adapters are layers of their own, and not linear",
}
"""Weights that become no part of one whole model, and why."""


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


class BottleneckConfig(Config):
    """Small networks behind the sublayers of every block."""

    size: int = Field(64, ge=1)
    """Width of their inner layer; 2·width·size + width + size numbers train in each."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """`houlsby`: behind attention and the feed-forward layer; `pfeiffer`: behind the latter."""


class WeightsConfig(Config):
    """What trains. Only the keys of the kind that `weights` names are looked at."""

    weights: Weights = "lora"
    """What trains: `lora` or `dora`, a low-rank adapter on the frozen model; `qlora` or `qdora`,
    the same on the model in 4 bits; `prefix_tuning`, `prompt_tuning`, `ia3`, `bottleneck` or
    `ln_tuning`, an adapter of that kind; `bitfit`, the biases; `full`, all weights, at 16 bytes a
    parameter."""
    lora: LoraConfig = LoraConfig()
    """The adapter of lora, dora, qlora and qdora."""
    bottleneck: BottleneckConfig = BottleneckConfig()
    """The adapter of bottleneck."""
    virtual_tokens: int = Field(20, ge=1)
    """How many virtual tokens stand before the first one, in prefix_tuning and prompt_tuning; the
    model's context is shorter by so many."""


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of parameters; two 4-bit ones in a byte are two."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train"


def prepare(model: Any, config: WeightsConfig, gradient_checkpointing: bool) -> tuple[Any, Any]:
    """The loaded base, made ready for what trains, and peft's configuration of the adapter to put
    on it, or None where there is no adapter.

    `keep_in_float32` has to follow once the adapter is on. Raises InputError where the model does
    not have what is to train.
    """
    weights = config.weights
    if weights == "full":
        return model, None
    if weights == "bitfit":
        found = biases(model)
        model.requires_grad_(False)
        for bias in found.values():
            bias.requires_grad_(True)
        keep_in_float32(model)
        return model, None
    if weights == "prefix_tuning" and gradient_checkpointing:
        # The prefix is a key-value cache, which checkpointed layers are not given.
        raise InputError(
            "weights: prefix_tuning cannot train with gradient_checkpointing; say "
            "gradient_checkpointing: false, or weights: prompt_tuning"
        )
    adapter = adapter_config(model, config)
    if weights == "prompt_tuning":
        count_positions_by_mask(model)
    if is_quantised(weights):
        import peft

        from training.quantization import require_nf4

        require_nf4(model, target_layers(model, config.lora))
        # TRL's trainers do not do this by themselves.
        kbit: Any = peft.prepare_model_for_kbit_training
        model = kbit(model, use_gradient_checkpointing=gradient_checkpointing)
    return model, adapter


def keep_in_float32(model: Any) -> None:
    """Hold what trains in float32, whatever the base computes in: in bfloat16, to which TRL puts
    adapters on 4-bit bases, small updates round to nothing."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def put_on(model: Any, config: WeightsConfig, gradient_checkpointing: bool = False) -> Any:
    """The loaded base with what trains on it, for a training loop of our own.

    TRL's trainers want the base and the configuration that `prepare` returns instead: for a ready
    adapter they would add a second one as reference.
    """
    model, adapter = prepare(model, config, gradient_checkpointing)
    if adapter is not None:
        import peft

        model = peft.get_peft_model(model, adapter)
    keep_in_float32(model)
    return model


def adapter_config(model: Any, config: WeightsConfig) -> Any:
    """The adapter that `config` names, on this model, for peft."""
    import peft

    causal: Any = {"task_type": "CAUSAL_LM"}
    match config.weights:
        case "lora" | "dora" | "qlora" | "qdora":
            target_layers(model, config.lora)
            return peft_config(config.lora, dora=config.weights in ("dora", "qdora"))
        case "prefix_tuning":
            # Zeros are nearer to the base than random keys and values are.
            return peft.PrefixTuningConfig(
                num_virtual_tokens=config.virtual_tokens, init_weights="zero", **causal
            )
        case "prompt_tuning":
            return peft.PromptTuningConfig(
                num_virtual_tokens=config.virtual_tokens,
                prompt_tuning_init="SAMPLE_VOCAB",
                **causal,
            )
        case "ia3":
            inner = _layers_named(model, FEED_FORWARD_OUT)
            scaled = _layers_named(model, ("k_proj", "v_proj"))
            if not inner or not scaled:
                raise InputError(_nowhere(config.weights, "keys and values of their own"))
            return peft.IA3Config(
                target_modules=scaled + inner, feedforward_modules=inner, **causal
            )
        case "bottleneck":
            from training.bottleneck import BottleneckPeftConfig

            layers = _layers_named(model, FEED_FORWARD_OUT)
            attention = _layers_named(model, ATTENTION_OUT)
            if not layers or not attention:
                raise InputError(_nowhere(config.weights, "sublayers whose ends are known"))
            if config.bottleneck.placement == "houlsby":
                layers += attention
            return BottleneckPeftConfig(
                target_modules=layers, size=config.bottleneck.size, **causal
            )
        case "ln_tuning":
            norms = [
                name
                for name, module in model.named_modules()
                if type(module).__name__.endswith("Norm") and list(module.parameters(recurse=False))
            ]
            if not norms:
                raise InputError(_nowhere(config.weights, "normalisation layers with weights"))
            return peft.LNTuningConfig(target_modules=norms, **causal)
        case _:
            raise ValueError(f"weights: {config.weights} has no adapter")


def peft_config(lora: LoraConfig, dora: bool = False) -> Any:
    """A low-rank adapter for peft, for a causal language model."""
    import peft

    target = lora.target_modules
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by the rank: any number
        lora_dropout=lora.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        use_dora=dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def target_layers(model: Any, lora: LoraConfig) -> list[str]:
    """Full names of the layers the adapter will sit on; InputError where a name fits none."""
    linear = _linear_layers(model)
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


def reference(model: Any) -> AbstractContextManager[Any]:
    """Inside, an adapted model answers as its base, which is the reference.

    A model without an adapter is returned as it is, and is the reference only until it trains.
    """
    off: AbstractContextManager[Any] = (
        model.disable_adapter() if hasattr(model, "peft_config") else contextlib.nullcontext()
    )
    return off


def virtual_tokens(model: Any) -> int:
    """How many stand before every row: those of prefix and prompt tuning."""
    adapter = getattr(model, "active_peft_config", None)
    return int(adapter.num_virtual_tokens) if adapter and adapter.is_prompt_learning else 0


def parameter_counts(model: Any) -> ParameterCounts:
    """How many parameters there are, and how many of them train."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else state.shape.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return ParameterCounts(trainable, total)


def biases(model: Any) -> dict[str, Any]:
    """By their names; raises InputError where a model has none."""
    found = {name: p for name, p in model.named_parameters() if name.split(".")[-1] == "bias"}
    if not found:
        raise InputError(
            f"weights: bitfit trains biases alone, and {model.name_or_path} has none; "
            "say weights: ln_tuning or weights: lora"
        )
    return found


def count_positions_by_mask(model: Any) -> None:
    """Number tokens by the mask, so that padding between virtual and real ones changes nothing.

    peft drops the numbers that generation makes; tokens would then be counted with the padding, and
    a prompt in a batch be answered otherwise than alone.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return  # it knows no absolute positions

    def number(_: Any, inputs: tuple[Any, ...], values: dict[str, Any]) -> Any:
        mask, embedded = values.get("attention_mask"), values.get("inputs_embeds")
        tokens = values.get("input_ids") if embedded is None else embedded
        if mask is not None and tokens is not None and values.get("position_ids") is None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            values["position_ids"] = positions[:, -tokens.shape[1] :]
        return inputs, values

    model.register_forward_pre_hook(number, with_kwargs=True)


def _linear_layers(model: Any) -> list[str]:
    """All but the head, in the order of the model."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def _layers_named(model: Any, ends: tuple[str, ...]) -> list[str]:
    return [
        name
        for name in _linear_layers(model)
        if any(f".{name}".endswith(f".{end}") for end in ends)
    ]


def _nowhere(weights: str, lacking: str) -> str:
    return f"weights: {weights} finds no {lacking} in this model; say weights: lora"
