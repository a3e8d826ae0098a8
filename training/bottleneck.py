"""Bottleneck adapters: small two-layer networks behind the sublayers of a frozen transformer.

A sublayer's output h becomes h + W_up·GELU(W_down·h + b_down) + b_up before it is added to the
residual stream. Houlsby et al. (2019) put one behind attention and one behind the feed-forward
layer of every block, Pfeiffer et al. (2021) only the latter. W_up and b_up start at zero, so the
model starts as it was. peft has no such adapter; this one is made of its parts, so that it is
switched, saved and loaded as all of peft's are. It cannot be merged: GELU is not linear.

This module imports peft at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.nn.functional import gelu


class Kind(str, enum.Enum):  # noqa: UP042  # peft's own kinds are made so: equal to their names
    """As peft's `PeftType`, which knows no such adapter."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckPeftConfig(PeftConfig):
    """For peft: which layers have an adapter behind them, and how wide it is."""

    target_modules: list[str] | None = None
    size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = Kind.BOTTLENECK


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer with adapters behind it, of which the active ones are computed."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, name: str, config: BottleneckPeftConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self._active_adapter = name
        self.add(name, config)

    def add(self, name: str, config: BottleneckPeftConfig) -> None:
        """Add an adapter that changes nothing yet."""
        base: Any = self.get_base_layer()
        width = base.out_features if hasattr(base, "out_features") else base.nf
        self.bottleneck_down[name] = nn.Linear(width, config.size)
        self.bottleneck_up[name] = up = nn.Linear(config.size, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        move: Any = self._move_adapter_to_device_of_base_layer
        move(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *inputs: Any, **values: Any) -> torch.Tensor:
        """The layer's output, shape (…, width), changed by the active adapters."""
        output: torch.Tensor = self.base_layer(*inputs, **values)
        if self.disable_adapters:
            return output
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down: Any = self.bottleneck_down[name]
                up = self.bottleneck_up[name]
                change = up(gelu(down(output.to(down.weight.dtype))))
                output = output + change.to(output.dtype)
        return output


class BottleneckModel(BaseTuner):
    """The model whose layers have adapters behind them, as peft wants it."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.add(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


# `peft.utils.register_peft_method` takes only the names of peft's own list.
PEFT_TYPE_TO_CONFIG_MAPPING[Kind.BOTTLENECK] = BottleneckPeftConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[Kind.BOTTLENECK] = BottleneckModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[Kind.BOTTLENECK] = BottleneckModel.prefix  # type: ignore[index]
