"""A reward head on a language model: loaded, read at the end of every answer, packed or with the
prompt of a pair in common, published.

transformers reads a sequence classifier at the last token that is not the padding token. Where
padding and end are the same token, that is the one before the end. Here positions come from
lengths, in training and in scoring, and what is published is such that libraries read it at the end
token too (`make_closed`).

This module imports torch at its head, so it is imported inside functions only.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from preferences.errors import InputError
from training.models import Dtype, Weights, is_quantised
from training.shared_attention import Segments, hidden_states

HEAD = "score"
"""What transformers calls the head of its sequence classifiers."""

EXACT = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1, "float64": 1e-10}
"""How far packed rewards may be from those of each answer alone, by what they are computed in; a
model that looks at its neighbours is off by about 1."""


@dataclass(frozen=True, slots=True)
class Batch:
    """N sequences in B rows of T tokens."""

    input_ids: Tensor
    """(B, T). What stands behind a row's last sequence is padding."""
    attention_mask: Tensor
    """(B, T), 1 at tokens of sequences. With `segments` it is of sequences in a row each: it only
    counts tokens then."""
    position_ids: Tensor
    """(B, T), from 0 in every sequence."""
    rows: Tensor
    """(N,), the row of each sequence, in the order they were given."""
    ends: Tensor
    """(N,), the place of each sequence's last token in its row."""
    segments: Segments | None = None
    """Which tokens see which, where no token stands twice and B is 1."""

    def tensors(self) -> dict[str, Any]:
        """By name, for the model; `segments` where there are some."""
        given = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in given.items() if value is not None}


def one_a_row(sequences: Sequence[list[int]]) -> Batch:
    """Each sequence in a row of its own, filled up at its right."""
    return _laid_out(sequences, [[i] for i in range(len(sequences))])


def packed(sequences: Sequence[list[int]], width: int | None) -> Batch:
    """Several sequences in a row, as many as fit beside the longest or into `width` tokens.

    With `width` None all of them in one row: what FlashAttention takes for packed.
    """
    if width is None:
        return _laid_out(sequences, [list(range(len(sequences)))])
    width = max(width, *map(len, sequences))
    rows: list[list[int]] = []
    free: list[int] = []
    # First fit, the longest first; ties in their order, so that packing is deterministic.
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        size = len(sequences[i])
        row = next((r for r, left in enumerate(free) if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(width)
        rows[row].append(i)
        free[row] -= size
    return _laid_out(sequences, rows)


def shared_pairs(sequences: Sequence[list[int]]) -> Batch:
    """All sequences in one row in which no token stands twice: the first half is chosen answers,
    the second the rejected ones to them, each behind its prompt.

    A model takes it whose attention is `training.shared_attention`'s, where `why_not` allows it.
    """
    from training.shared_prefix import shared

    apart = one_a_row(sequences)
    row = shared(apart.input_ids, apart.attention_mask, answers=2)
    ends = row.places[apart.rows, apart.ends]
    return Batch(
        row.input_ids,
        apart.attention_mask,
        row.position_ids,
        torch.zeros_like(ends),
        ends,
        row.segments,
    )


def _laid_out(sequences: Sequence[list[int]], rows: Sequence[Sequence[int]]) -> Batch:
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    shape = len(rows), width
    # Any token does for padding: what decides is the mask, or that no sequence reaches so far.
    ids, present, positions = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    row_of, ends = (torch.zeros(len(sequences), dtype=torch.long) for _ in range(2))
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            end = start + len(sequences[i])
            ids[r, start:end] = torch.tensor(sequences[i])
            present[r, start:end] = 1
            positions[r, start:end] = torch.arange(end - start)
            row_of[i], ends[i] = r, end - 1
            start = end
        positions[r, start:] = torch.arange(width - start)
    return Batch(ids, present, positions, row_of, ends)


def load(model: str, revision: str | None, weights: Weights, dtype: Dtype, seed: int) -> Any:
    """The model with a reward head in place of its language head, on the one device there is.

    The head is drawn from N(0, 1/(d + 1)) for d hidden units, so that first rewards are of the size
    of 1 (Stiennon et al. 2020); a model that has a trained head of one output keeps it.
    """
    from transformers import AutoModelForSequenceClassification

    from training.quantization import nf4

    kind = torch.float32 if weights == "full" else getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": kind, "num_labels": 1, "revision": revision}
    if is_quantised(weights):
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        options |= {"quantization_config": nf4(dtype), "device_map": {"": device}}
    try:
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            model, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{model}: cannot be loaded with a reward head ({first}); "
            "take a model that transformers has a sequence classifier for"
        ) from None
    head = getattr(loaded, HEAD, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(
            f"{model}: its sequence classifier has no head that is one linear layer with one "
            "output; take another model"
        )
    # Held in float32: what a reward differs by between two answers is lost in three digits.
    head.to(torch.promote_types(kind, torch.float32))
    if any(name.startswith(f"{HEAD}.") for name in info["missing_keys"]):
        draw = torch.Generator().manual_seed(seed)
        start = torch.randn(head.weight.shape, generator=draw) / math.sqrt(head.in_features + 1)
        head.weight.data.copy_(start)
        if head.bias is not None:
            head.bias.data.zero_()
    return loaded


def read_at_ends(model: Any, packing: bool) -> None:
    """Make the model's forward pass return the rewards at the given ends, `logits` (N, 1).

    It takes a `Batch`'s tensors; without `ends` it is the library's. One with `segments` says
    itself what sees what, whatever `packing` is. Packed sequences do not see each other, because no
    mask is given and positions begin anew in each: then transformers builds the block mask for the
    attentions `eager`, `sdpa` and `flex_attention` in any number of rows, and `flash_attention_2`
    and `_3` compute each sequence by itself where there is one row. Layers that are not attention
    (convolutions, state spaces) would look across; `require_exact` finds it.
    """
    library: Any = model.forward

    def forward(input_ids: Tensor | None = None, **given: Any) -> Any:
        if input_ids is None or given.get("ends") is None:
            return library(input_ids=input_ids, **given)
        positions, segments = given["position_ids"], given.get("segments")
        if segments is not None:
            states = hidden_states(model.base_model, input_ids, positions, segments)[None]
        else:
            states = model.base_model(
                input_ids=input_ids,
                attention_mask=None if packing else given["attention_mask"],
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
        head = getattr(model, HEAD)
        kind = head.weight.dtype
        with torch.autocast(states.device.type, enabled=False):
            rewards = head(states[given["rows"], given["ends"]].to(kind))
        return SequenceClassifierOutput(logits=rewards)

    model.forward = forward


def row_width(model: Any) -> int | None:
    """How long packed rows are, for `packed`: as the longest sequence, or one row of them all."""
    return None if "flash" in str(model.config._attn_implementation) else 0


def rewards(
    model: Any, sequences: Sequence[list[int]], batch_size: int, bf16: bool = False
) -> list[float]:
    """The reward of each tokenized conversation, by a model that reads at ends; without packing."""
    found: list[float] = []
    device = next(model.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, bf16):
        for start in range(0, len(sequences), batch_size):
            batch = one_a_row(sequences[start : start + batch_size])
            found += _read(model, batch, device)
    return found


def _read(model: Any, batch: Batch, device: Any) -> list[float]:
    tensors = {name: tensor.to(device) for name, tensor in batch.tensors().items()}
    values: list[float] = model(**tensors).logits[:, 0].double().tolist()
    return values


def require_exact(model: Any, sequences: Sequence[list[int]], dtype: str) -> None:
    """Raises InputError if packed sequences get other rewards than each alone.

    Some models look past what they are told, and training then runs all the same.
    """
    device = next(model.parameters()).device
    trained = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
        alone = [_read(model, packed([one], row_width(model)), device)[0] for one in sequences]
        # Each row is long enough for several, so that there is something to look past.
        width = row_width(model)
        room = None if width is None else sum(map(len, sequences))
        together = _read(model, packed(sequences, room), device)
    model.train(trained)
    worst = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    if not worst <= EXACT[dtype] * max(1.0, *map(abs, alone)):
        raise InputError(
            f"packing: rewards change by {worst:.2g} with what is packed beside an answer, so this "
            "model looks across; say packing: false"
        )


def make_closed(tokenizer: Any, ends: Collection[int]) -> None:
    """Make what the tokenizer renders end with the answer's end token, and padding another token.

    Whoever renders a conversation with the published tokenizer and scores it with the published
    model then reads at the token that was trained, though he knows nothing of lengths: templates
    that add a newline behind the end token no longer do, and the last token is never padding.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and not template.startswith(_CLOSING):
        tokenizer.chat_template = f"{_CLOSING}{template}{_CLOSED}"
    if tokenizer.pad_token_id in ends:
        others = (tokenizer.unk_token_id, tokenizer.bos_token_id, *range(len(tokenizer)))
        other = next(i for i in others if i is not None and i not in ends)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(other)


_CLOSING = "{% set rendered +%}"
_CLOSED = "{%+ endset %}{{- rendered if add_generation_prompt else rendered.rstrip() -}}"


def publish(
    model: str,
    revision: str | None,
    weights: Weights,
    dtype: Dtype,
    adapter: Path,
    folder: Path,
) -> None:
    """The trained adapter and head merged into their base, in `folder`, whole or not at all.

    A base in 4 bits is dequantised first and kept in `dtype`: the adapter was trained on the
    rounded weights and fits only them (`training.merge` has the figures).
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoTokenizer

    from training.quantization import dequantised

    kind = getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = load(model, revision, weights, dtype, 0)
    base = dequantised(base) if is_quantised(weights) else base
    adapted: Any = peft.PeftModel.from_pretrained(base, str(adapter))
    # One layer at a time: all of them in float32 would need twice the memory of the result.
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.get_base_layer().to(torch.float32)
            layer.merge(safe_merge=True)
            layer.get_base_layer().to(kind)
    merged = adapted.unload()  # the trained head stays in the place of the new one
    merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    merged.to(kind).save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def add_adapter(policy: Any, adapter: Path, name: str) -> nn.Linear:
    """Put a trained reward model's adapter on a causal language model that has adapters, under
    `name` and off; returns its head (d → 1), frozen and in float32.

    With the adapter on, the head on the last hidden state of a conversation's end token is the
    reward. Raises InputError if the adapter was trained on a model of another shape.
    """
    import peft
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    saved = load_peft_weights(str(adapter), device="cpu")
    mine = {key: saved.pop(key) for key in list(saved) if f".{HEAD}." in f".{key}"}
    config: Any = peft.PeftConfig.from_pretrained(str(adapter))
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
    active = policy.active_adapter
    trains = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    policy.add_adapter(name, config)
    fitted = [p for key, p in policy.named_parameters() if f".{name}." in key]
    for parameter in fitted:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(False)
    weight = next((v for key, v in mine.items() if key.endswith("weight")), None)
    if weight is None or len(fitted) != len(saved):
        raise InputError(
            f"{adapter}: its adapter or its reward head does not fit this model; give a reward "
            "model that was trained on the same base"
        )
    set_peft_model_state_dict(policy, saved, adapter_name=name)
    policy.set_adapter(active)
    for parameter in trains:
        parameter.requires_grad_(True)
    bias = next((v for key, v in mine.items() if key.endswith("bias")), None)
    head = nn.Linear(weight.shape[1], 1, bias=bias is not None)
    head.weight.data.copy_(weight)
    if bias is not None:
        head.bias.data.copy_(bias)
    device = next(policy.parameters()).device
    return head.float().to(device).requires_grad_(False)
