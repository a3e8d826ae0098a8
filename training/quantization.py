"""4-bit base weights (QLoRA, Dettmers et al. 2023), and the check that they really are 4-bit."""

from __future__ import annotations

from typing import Any

from preferences.errors import InputError
from training.models import Dtype


def nf4(compute: Dtype) -> Any:
    """NF4 with double quantisation, 4.13 bits a weight, computing in `compute`.

    All four are said: the library's defaults are FP4, float32 and single quantisation.
    """
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute),
    )


def require_nf4(model: Any, layers: list[str]) -> None:
    """Raises InputError unless each named layer is NF4 with double quantisation.

    A model that says it is quantised need not be: a layer may have been skipped, or another
    4-bit format taken, and training then runs all the same.
    """
    modules = dict(model.named_modules())
    found = {name: _format(modules[name]) for name in layers}
    wrong = {name: what for name, what in found.items() if what != "nf4, double quantised"}
    if wrong or not found:
        name, what = next(iter(wrong.items()), ("no layer", "linear"))
        raise InputError(
            f"QLoRA needs 4-bit NF4 layers with double quantisation, and {len(wrong)} of "
            f"{len(found)} are not: {name} is {what}; check the bitsandbytes installation, or "
            "train with weights: lora"
        )


def dequantised(model: Any) -> Any:
    """The model with every 4-bit layer as the ordinary one it computes as, on the CPU.

    The weights are the rounded ones, not the original's: an adapter trained on the former fits only
    them. Their number format is the one they are computed in.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear4bit):
            continue
        held: Any = layer.weight
        weight = dequantize_4bit(held.data, held.quant_state).cpu()
        plain = torch.nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.data.cpu(), requires_grad=False)
        model.set_submodule(name, plain)
    if getattr(model, "hf_quantizer", None) is not None:
        # Else the configuration still says 4 bits, and whoever loads the model believes it.
        model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    return model.to("cpu")


def _format(layer: Any) -> str:
    weight: Any = layer.weight
    from bitsandbytes.nn.modules import Linear4bit

    if not isinstance(layer, Linear4bit):
        return f"{type(layer).__name__} in {str(weight.dtype).removeprefix('torch.')}"
    state = weight.quant_state
    if state is None:
        return "Linear4bit, not quantised yet"
    return f"{state.quant_type}, {'double' if state.nested else 'single'} quantised"
