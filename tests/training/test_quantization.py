"""A run called QLoRA trains on weights that really are in 4 bits."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from preferences.errors import InputError, MissingExtra
from training import models
from training.adapters import LoraConfig, target_layers
from training.models import load_model
from training.quantization import dequantised, require_nf4


@pytest.mark.parametrize("weights", ["qlora", "qdora"])
def test_every_target_layer_is_nf4_with_double_quantisation(weights: Any, model: str) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    quantised = load_model(model, None, weights, "float32")
    layers = target_layers(quantised, LoraConfig())
    # 2 blocks of q, k, v, o, gate, up, down; the head stays as it is.
    assert len(layers) == 14
    require_nf4(quantised, layers)
    modules = dict(quantised.named_modules())
    for name in layers:
        assert isinstance(modules[name], Linear4bit)
        state = modules[name].weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
        # Two weights a byte.
        assert modules[name].weight.numel() == state.shape.numel() // 2


def test_a_model_that_is_not_quantised_is_refused(model: str) -> None:
    plain = load_model(model, None, "lora", "float32")
    with pytest.raises(InputError, match=r"14 of 14 are not: .*q_proj is Linear in float32"):
        require_nf4(plain, target_layers(plain, LoraConfig()))


def test_another_four_bit_format_is_refused(model: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # What bitsandbytes does by default.
    fp4 = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    with pytest.raises(InputError, match="is fp4, single quantised"):
        require_nf4(fp4, target_layers(fp4, LoraConfig()))


def test_without_bitsandbytes_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    absent = lambda name: None if name == "bitsandbytes" else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    models.require_libraries("lora", "none")
    for weights in ("qlora", "qdora"):
        with pytest.raises(MissingExtra, match=r"bitsandbytes: pip install pairwright\[train\]"):
            models.require_libraries(weights, "none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantised_layers_hold_the_numbers_that_the_4_bit_ones_compute_with(
    dtype: Any, model: str
) -> None:
    import torch

    quantised, plain = (load_model(model, None, "qlora", dtype) for _ in range(2))
    plain = dequantised(plain)
    kinds = {type(layer) for layer in plain.modules() if hasattr(layer, "in_features")}
    assert kinds == {torch.nn.Linear}
    assert {p.dtype for p in plain.parameters()} == {getattr(torch, dtype)}
    assert not hasattr(plain.config, "quantization_config")
    ids = torch.tensor([[2, 4, 8, 15, 3]])
    with torch.no_grad():
        expected, found = quantised(input_ids=ids).logits, plain(input_ids=ids).logits
    # The 4-bit layers add up in another order; bfloat16 has three digits.
    assert torch.allclose(expected, found, atol=1e-4 if dtype == "float32" else 0.1)
    # They are the rounded numbers, 16 for each block of 64, and not the original's.
    name = "model.layers.0.mlp.up_proj.weight"
    weight = plain.get_parameter(name).detach()
    assert all(len(block.unique()) <= 16 for block in weight.reshape(-1, 64))
    original = load_model(model, None, "lora", dtype).get_parameter(name)
    assert not torch.equal(weight, original)


def test_a_layer_that_the_model_lacks_is_named_with_those_it_has(model: str) -> None:
    plain = load_model(model, None, "lora", "float32")
    with pytest.raises(InputError, match=r"no linear layer 'query'; it has down_proj, .*q_proj"):
        target_layers(plain, LoraConfig(target_modules=("q_proj", "query")))


def test_an_adapter_on_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="never be trained"):
        LoraConfig(target_modules=("lm_head",))
