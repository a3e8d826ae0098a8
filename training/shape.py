"""What a model is made of, from its configuration alone: no weight is read or made.

The model's own code is run on tensors without numbers (torch's meta device), so counts are exact
for every architecture that transformers knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preferences.errors import InputError


@dataclass(frozen=True, slots=True)
class Shape:
    """Numbers of parameters by what becomes of them, and the sizes that memory depends on."""

    name: str
    """The model's kind, as `llama`."""
    layers: int
    hidden: int
    vocabulary: int
    kv_size: int
    """Numbers a token leaves in the key-value cache, over all layers."""
    linear: int
    """In linear layers other than the head, which 4-bit loading packs; biases are not among them.
    """
    quantised_layers: tuple[int, ...]
    """The same, of each such layer, from large to small."""
    head: int
    """In the matrix that makes logits; 0 where it is the embeddings' own."""
    other: int
    """Embeddings, norms, biases, and experts held as one tensor: never packed."""
    idle: int
    """In experts that a token does not pass through."""

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return self.linear + self.head + self.other

    @property
    def active(self) -> int:
        """Parameters that a token passes through."""
        return self.total - self.idle


def model_config(model: str, revision: str | None) -> Any:
    """The configuration of a model, from its folder or the Hub; InputError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{model}: no configuration can be read ({reason}); name a folder with config.json or "
            "a model of the Hub"
        ) from None


def shape_of(config: Any) -> Shape:
    """The shape of the causal language model that a configuration describes."""
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(config)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    head_count = head.weight.numel() if head is not None and not tied else 0
    linear = sorted(
        (m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear and m is not head),
        reverse=True,
    )
    counts = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(counts.values())
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    heads = text.num_attention_heads
    per_head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return Shape(
        name=config.model_type,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        kv_size=2 * text.num_hidden_layers * kv_heads * per_head,
        linear=sum(linear),
        quantised_layers=tuple(linear),
        head=head_count,
        other=total - sum(linear) - head_count,
        idle=round(experts * (1 - _share_of_experts(text))),
    )


def _share_of_experts(text: Any) -> float:
    used = getattr(text, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    there = next((n for name in names if (n := getattr(text, name, None))), None)
    return used / there if used and there else 1.0
