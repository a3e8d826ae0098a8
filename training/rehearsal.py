"""A training step on tensors without numbers: what it would hold in memory, and when most.

The model's own code runs forward and backward as in training, adapter, checkpointing and autocast
included, on torch's fake tensors: every operation says how large its results are and computes
nothing. What lives is counted from one operation to the next. So the activations of any
architecture are known without a formula, and without its weights or a GPU.

Only a few layers are run: they are alike, so what each adds is the difference between two depths.

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training import adapters, frozen_head, shared_attention
from training.adapters import WeightsConfig
from training.models import is_quantised
from training.shared_attention import Segments
from training.stand_ins import FourBit, attention, tiled

Head = Callable[[Tensor, Any], Tensor]
"""From the last hidden states, (rows, tokens, hidden) or in one row (tokens, hidden), and the head
to a scalar loss."""

DEPTHS = (2, 4)
"""How many layers are run; a single one would be first and last at once."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What goes through the model at once, and how."""

    rows: int
    """Sequences."""
    tokens: int
    """In each, padding included."""
    checkpointing: bool = True
    autocast: bool = True
    """Whether it computes in bfloat16 whatever the weights are held in."""
    padded: bool = False
    """Whether rows differ in length: attention is then given a mask, and every query head keys and
    values of its own."""
    adapter_float32: bool = True
    """Whether what trains is held in float32, as it is here."""
    keeps_inputs: bool = False
    """Whether 4-bit layers keep their inputs for the backward pass, as those of bitsandbytes once
    did; those of 0.50 do not."""
    segments: Segments | None = None
    """Which tokens of a single row see which, where the batch is one in which no token stands twice
    (`training.shared_prefix`)."""
    on_gpu: bool = True
    """Whether such a row goes through the kernels of a GPU or, segment by segment, a CPU's."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes at the fullest moment of a step, and how many parameters train."""

    activations: float
    """All that is neither weight nor gradient nor optimiser state."""
    trained: float
    kept: float
    """Of the activations, what waits for the backward pass when the loss is there."""


def rehearse(config: Any, weights: WeightsConfig, shown: Pass, head: Head, dtype: str) -> Held:
    """What a forward and a backward pass of the model that `config` describes would hold.

    Gradients are taken to be there throughout, as they are with accumulation, and are not counted.
    """
    layers = config.get_text_config().num_hidden_layers
    shallow, deep = (min(depth, layers) for depth in DEPTHS)
    one = _rehearsed(cut(config, shallow), weights, shown, head, dtype)
    other = _rehearsed(cut(config, deep), weights, shown, head, dtype) if deep > shallow else one
    beyond = (layers - shallow) / max(deep - shallow, 1)
    held, trained, kept = (
        [x + beyond * (y - x) for x, y in zip(xs, ys, strict=True)]
        for xs, ys in zip(one, other, strict=True)
    )
    # Which part of a step is the fullest depends on the depth, so each is carried on by itself.
    return Held(max(held), trained[0], kept[0])


def fused_head(states: Tensor, layer: nn.Module) -> Tensor:
    """TRL's: log-probabilities of all tokens, from tiles of logits that are never kept."""
    flat = states.reshape(-1, states.shape[-1])
    kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else flat.dtype
    return tiled(flat, layer.weight, kind).sum()  # type: ignore[no-any-return]


def shared_head(scored: int, softcap: float | None, on_gpu: bool = True) -> Head:
    """That of `training.shared_prefix`: log-probabilities of so many answers' tokens alone."""

    def head(states: Tensor, layer: Any) -> Tensor:
        places = torch.zeros(scored, dtype=torch.long)
        hidden = states.index_select(0, places)
        if layer.weight.requires_grad:
            return fused_head(hidden, layer)
        with _held_as("cuda" if on_gpu else "cpu"):
            frozen: Any = frozen_head.FrozenHead.apply
            found: Tensor = frozen(softcap, hidden, layer.weight, places)[0]
        return found.sum()

    return head


@contextmanager
def _held_as(device: str) -> Iterator[None]:
    """Inside, the head holds as many logits at once as it does there."""
    before = frozen_head.HELD["cpu"]
    frozen_head.HELD["cpu"] = frozen_head.HELD[device]
    try:
        yield
    finally:
        frozen_head.HELD["cpu"] = before


def full_head(scored: int) -> Head:
    """PPO's: the whole distribution of the last `scored` tokens of each row, in float32."""

    def head(states: Tensor, layer: nn.Module) -> Tensor:
        logits = layer(states[:, -scored:])
        distribution = (logits.float() / 0.7).log_softmax(-1)
        tokens = torch.zeros(distribution.shape[:2], dtype=torch.long)[..., None]
        read: Tensor = distribution.gather(-1, tokens).sum() + states.float().sum()  # values too
        return read

    return head


def no_head(states: Tensor, layer: nn.Module) -> Tensor:
    """A reward model's: a number from the last hidden state."""
    read: Tensor = states[..., -1, :].float().sum()
    return read


def _rehearsed(
    config: Any, weights: WeightsConfig, shown: Pass, head: Head, dtype: str
) -> tuple[list[float], list[float], list[float]]:
    """The most that is held in the forward pass, in the loss, in its gradient and in the layers'
    gradients; the number of parameters that train; and what is held when the loss is there."""
    ALL_ATTENTION_FUNCTIONS["rehearsed"] = attention
    by_segments = shown.segments is not None and not shown.on_gpu
    config._attn_implementation = shared_attention.NAME if by_segments else "rehearsed"
    full = weights.weights == "full"
    held_in = torch.float32 if full else getattr(torch, dtype)
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=held_in)
        output = model.get_output_embeddings()
        model = _with_what_trains(model, output, weights, shown)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if shown.checkpointing:
        # Random state is a real tensor, which fake ones cannot be mixed with.
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        base.enable_input_require_grads()
    base.set_output_embeddings(nn.Identity())
    model.train()
    with FakeTensorMode():
        kept = _made_fake(model, output)
        trained = [p for p in kept if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=shown.autocast)
        with LiveMemory([*kept, *(p.grad for p in trained)]) as memory:
            with autocast:
                states = _states(model, base, shown)
                memory.next_part()
                states.register_hook(lambda _: memory.next_part())
                loss: Any = head(states, output)
            kept = memory.live
            memory.next_part()  # autocast has let go of its copies of the weights
            loss.backward()
            memory.next_part()
    return memory.peaks, [sum(p.numel() for p in trained)], [kept]


def _states(model: Any, base: Any, shown: Pass) -> Any:
    """Of the last layer, made as training makes them; the head has been taken off."""
    ids = torch.zeros(shown.rows, shown.tokens, dtype=torch.long)
    if shown.segments is not None:
        segments = replace(shown.segments, masks={})  # those of another depth are other fakes
        return shared_attention.hidden_states(base.base_model, ids, ids, segments)
    inputs: dict[str, Any] = {"input_ids": ids}
    virtual = adapters.virtual_tokens(model)
    if virtual:
        inputs = _behind_virtual(model, base, ids, virtual)
    if shown.padded:
        asked = shown.tokens + (virtual if "inputs_embeds" in inputs else 0)
        shape = shown.rows, 1, asked, shown.tokens + virtual
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.bool)
        inputs["position_ids"] = torch.zeros(shown.rows, asked, dtype=torch.long)
    states = (base if virtual else model)(**inputs, use_cache=False).logits
    return states[:, -shown.tokens :] if virtual else states


def _behind_virtual(model: Any, base: Any, ids: Tensor, virtual: int) -> dict[str, Any]:
    """As peft puts virtual tokens before every row, whose own way there takes no ready mask."""
    model.prompt_tokens = {name: torch.arange(virtual) for name in model.prompt_tokens}
    start = model.get_prompt(batch_size=len(ids))
    if not isinstance(start, Tensor):
        return {"input_ids": ids, "past_key_values": start}
    embedded = base.get_input_embeddings()(ids)
    return {"inputs_embeds": torch.cat([start.to(embedded.dtype), embedded], dim=1)}


def _with_what_trains(model: Any, output: Any, weights: WeightsConfig, shown: Pass) -> Any:
    if is_quantised(weights.weights):
        model.requires_grad_(False)
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and layer is not output:
                model.set_submodule(name, FourBit(layer, shown.keeps_inputs))
        packed = {id(m.weight) for m in model.modules() if isinstance(m, FourBit)}
        for parameter in model.parameters():
            if id(parameter) not in packed and shown.adapter_float32:
                # peft's preparation for training on 4 bits does so to all that is not packed.
                parameter.data = parameter.data.float()
        import peft

        model = peft.get_peft_model(model, adapters.adapter_config(model, weights))
    else:
        model = adapters.put_on(model, weights)
        if shown.adapter_float32:
            return model
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = torch.float32 if shown.adapter_float32 else torch.bfloat16
            parameter.data = parameter.data.to(kind)
    return model


def _made_fake(*modules: nn.Module) -> list[Tensor]:
    """Put fake tensors in the place of those on the meta device; returns them, each once."""
    made: dict[int, Tensor] = {}
    for module in (m for each in modules for m in each.modules()):
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    made[id(tensor)] = fake
                place[name] = made[id(tensor)]  # type: ignore[assignment]
    return list(made.values())


def cut(config: Any, layers: int) -> Any:
    """The same model with its first layers only."""
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    if getattr(text, "final_logit_softcapping", None):
        text.final_logit_softcapping = None  # it would be laid on the hidden states
    return shallow


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, for as long as anything holds them."""

    def __init__(self, not_counted: list[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peaks: list[float] = []
        """Of the parts of the step that are over."""
        self._peak = 0
        self._known: dict[int, int] = {}
        for tensor in not_counted:
            if tensor is not None:
                self._meet(tensor, counted=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at what came out."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf, counted=True)
        return out

    def next_part(self) -> None:
        """Keep the peak so far and begin another."""
        self.peaks.append(self._peak)
        self._peak = self.live

    def _meet(self, tensor: Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if counted else 0
        self.live += self._known[key]
        self._peak = max(self._peak, self.live)
        weakref.finalize(storage, self._lose, key)

    def _lose(self, key: int) -> None:
        self.live -= self._known.pop(key)
