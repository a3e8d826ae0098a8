"""The forward pass of preference training with every token computed once.

A pair's two rows begin alike, and a batch's shorter rows end in padding. TRL computes the prompt
twice, the padding and, without a GPU, the logits of every token. Here the batch becomes one row in
which nothing stands twice (`training.shared_attention`), and only answers' tokens are scored. What
comes back is what TRL's own forward pass returns, `model(input_ids, attention_mask, labels,
fused_lm_head=True)`, so its losses, its metrics and its two ways to a reference are inherited, and
their values too: `why_not` says where that does not hold, and TRL's forward pass then stays.

This module imports trl at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

from training.frozen_head import FrozenHead
from training.shared_attention import NAME, Segments, hidden_states

EXACT = (
    "LlamaModel",
    "Qwen2Model",
    "Qwen3Model",
    "MistralModel",
    "Phi3Model",
    "GemmaModel",
    "Gemma2Model",
    "Gemma3TextModel",
    "Olmo2Model",
)
"""Decoders of transformers whose layers look at other tokens by attention alone, which this
replaces; tests compare each, below the head it has, with the library's forward pass."""

IGNORED = -100
"""The label of a token that is not scored."""

VOCABULARY_AT_ONCE = 1 << 15
"""How many tokens' logits TRL holds at a time."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A padded batch of R rows of S tokens, in one row of T tokens that are all different."""

    input_ids: Tensor
    """(1, T)."""
    position_ids: Tensor
    """(1, T), from 0 in every row of the batch."""
    places: Tensor
    """(R, S), where in the new row each token stands; of padding, anywhere."""
    segments: Segments


def shared(input_ids: Tensor, attention_mask: Tensor, answers: int) -> Shared:
    """Put a batch in one row. Both tensors have the shape (R, S) and are padded at their right.

    Row r shares what it begins with with row r − k·R/answers, the first of its group: so TRL lays
    pairs out, all chosen answers before all rejected ones, with `answers` 2.
    """
    rows, width = input_ids.shape
    ids, real = (
        each.view(answers, rows // answers, width).transpose(0, 1)
        for each in (input_ids, attention_mask.bool())
    )
    if (real[..., 1:] & ~real[..., :-1]).any():
        raise ValueError("a row has padding before its last token; pad at the right")
    alike = (ids == ids[:, :1]) & real & real[:, :1]
    alike[:, 0] = False  # the first of a group stands there as a whole
    alike = alike.cumprod(dim=-1).bool()
    kept = real & ~alike
    places = kept.flatten().cumsum(0).sub(1).view(kept.shape)
    places = torch.where(alike, places[:, :1], places).clamp(min=0)
    positions = torch.arange(width, device=ids.device).expand(ids.shape)
    sizes = torch.stack([kept.sum(-1), alike.sum(-1)]).flatten(1).tolist()
    return Shared(
        ids[kept][None],
        positions[kept][None],
        places.transpose(0, 1).reshape(rows, width),
        Segments(tuple(sizes[0]), tuple(sizes[1]), answers, {}),
    )


def share(model: Any, answers: int) -> None:
    """Exchange the forward pass that TRL's `add_fused_lm_head` gave to a causal language model.

    `answers` is how many rows of a batch follow one prompt. Called in any other way, the model
    computes what it did.
    """
    exchange_forward(model, functools.partial(_scored, answers))


def exchange_forward(model: Any, scored: Callable[..., FusedCausalLMOutput]) -> None:
    """Have a causal language model answer TRL's calls, those with `fused_lm_head`, by `scored`,
    which gets the model first, and all others as before. Its decoder then reads packed rows."""
    library = model.forward
    model.set_attn_implementation(NAME)

    # Generation looks at the signature.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **given: Any) -> Any:
        return scored(self, *args, **given) if fused_lm_head else library(*args, **given)

    model.forward = types.MethodType(forward, model)


def _scored(
    answers: int,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    use_cache: bool = False,
    **given: Any,
) -> FusedCausalLMOutput:
    others = [name for name, value in given.items() if value is not None]
    if others:
        raise TypeError(f"shared prefixes know nothing of {', '.join(others)}")
    batch = shared(input_ids, attention_mask, answers)
    states = hidden_states(model.base_model, batch.input_ids, batch.position_ids, batch.segments)
    targets = labels[:, 1:]
    scored = targets != IGNORED
    hidden = states.index_select(0, batch.places[:, :-1][scored])
    log_probs, entropy, mean, likely = (
        values.new_zeros(scored.shape).masked_scatter(scored, values)
        for values in head_of(model)(hidden, targets[scored])
    )
    return FusedCausalLMOutput(
        log_probs=log_probs,
        entropy=entropy,
        mean_logits=mean,
        is_top1=likely,
        label_mask=scored,
    )


def _training_head(
    softcap: float | None, hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    wanted = ("log_probs", "entropy", "mean_logits", "is_top1")
    trl: Any = ChunkedLogProbFunction.apply
    log_probs, entropy, _, mean, likely = trl(
        hidden, weight, None, targets, 1.0, VOCABULARY_AT_ONCE, softcap, 1.0, wanted
    )
    return log_probs, entropy, mean, likely


def head_of(model: Any, temperature: float = 1.0) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A function of hidden states (N, H) and target tokens (N,): log-probabilities of the targets,
    entropies, mean logits and whether the target is the likeliest, (N,) each, where logits are
    divided by `temperature`. `model` is the causal language model below its adapters."""
    softcap = getattr(model.config, "final_logit_softcapping", None)
    softcap = None if softcap is None else softcap / temperature
    weight = model.get_output_embeddings().weight
    trains = weight.requires_grad and torch.is_grad_enabled()
    head: Any = _training_head if trains else FrozenHead.apply
    if temperature == 1:
        return lambda hidden, targets: head(softcap, hidden, weight, targets)
    # A smaller state has smaller logits, and c·tanh(z/c)/τ is (c/τ)·tanh((z/τ)/(c/τ)).
    return lambda hidden, targets: head(softcap, hidden / temperature, weight, targets)


def why_not(model: Any) -> str | None:
    """Why tokens of this model, with its adapter if it has one, cannot be shared without changing
    what is trained; None where they can."""
    base = _base(model)
    kind = type(base)
    decoder = type(base.base_model).__name__
    if decoder not in EXACT or not kind.__module__.startswith("transformers."):
        return f"it is not known to be exact for {kind.__name__}"
    if any(one.is_prompt_learning for one in getattr(model, "peft_config", {}).values()):
        return "virtual tokens stand before every row"
    attention = base.config._attn_implementation
    if attention != "sdpa":
        return f"the model's attention is {attention}, not sdpa"
    if getattr(base.config, "use_bidirectional_attention", False):
        return "the model looks at later tokens"
    if any(_drops(module) for module in model.modules()):
        return "dropout draws anew for every row"
    return None


def _drops(module: nn.Module) -> bool:
    share = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
    return isinstance(share, float) and share > 0


class SharedPrefix:
    """Goes before a trainer of TRL's: its forward pass computes each token once where that is
    exact."""

    answers: int = 2
    """How many rows of a batch follow one prompt."""
    model: Any
    forward_pass: str | None = None
    """Which one runs and why, in words that the run says to people."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self._share()

    def _precompute_ref_logps(self, *args: Any) -> Any:
        self._share()
        trl: Any = super()
        return trl._precompute_ref_logps(*args)

    def _share(self) -> None:
        if self.forward_pass is not None:
            return
        reason = why_not(self.model)
        if reason is None:
            share(_base(self.model), self.answers)
            self.forward_pass = "shared: each prompt once, no padding, answers' tokens scored"
        else:
            self.forward_pass = f"TRL's, with padding and repeated prompts: {reason}"


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model
