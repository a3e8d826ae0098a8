"""Small random models of all architectures for which sharing is exact, and a batch of pairs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import add_fused_lm_head

IGNORED = -100
WINDOW = 7
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")

SLIDING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen2Config": {"use_sliding_window": True, **SLIDING},
    "Qwen3Config": {"head_dim": 8, "use_sliding_window": True, **SLIDING},
    "MistralConfig": {"sliding_window": WINDOW},
    "Phi3Config": {"sliding_window": WINDOW},
    "GemmaConfig": {"head_dim": 8},
    "Gemma2Config": {"head_dim": 8, "final_logit_softcapping": 3.0, **SLIDING},
    "Gemma3TextConfig": {"head_dim": 8, **SLIDING},
    "Olmo2Config": {},
}


def a_model(config: str = "LlamaConfig", **changes: Any) -> Any:
    """Two layers of random weights, with a head that is frozen and TRL's forward pass."""
    import transformers

    torch.manual_seed(0)
    make: Any = transformers.AutoModelForCausalLM.from_config
    model = make(
        getattr(transformers, config)(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            **{**ARCHITECTURES[config], **changes},
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15)
    model.get_output_embeddings().weight.requires_grad_(False)
    add_fused_lm_head(model, outputs=FIELDS)
    return model.train()


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Rows of a prompt and its answer, as TRL's collator makes them."""
    ids = [torch.tensor([*prompt, *answer]) for prompt, answer in rows]
    labels = [torch.tensor([*[IGNORED] * len(prompt), *answer]) for prompt, answer in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def a_batch() -> dict[str, Tensor]:
    """Pairs of all kinds, the chosen answers first."""
    torch.manual_seed(1)
    p, q, *others = (torch.randint(3, 97, (n,)).tolist() for n in (9, 14, 8, 5, 7, 6))
    x, y, z, v = others
    pairs = [
        (p, x, p, y),  # as most are
        (q, x, q, x[:2]),  # one answer begins the other
        (p, [*x[:3], *y], p, [*x[:3], *z]),  # answers begin alike
        (q, x, q[4:], x),  # cut at its left: nothing is shared
        (p, z, p, z),  # the same twice
        ([5], v, [5], z),  # a prompt of one token
    ]
    chosen = [(prompt, answer) for prompt, answer, _, _ in pairs]
    return padded(chosen + [(prompt, answer) for _, _, prompt, answer in pairs])


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Length of the difference, divided by the length."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours)
    return math.sqrt(difference / sum(float(each.square().sum()) for each in theirs.values()))
