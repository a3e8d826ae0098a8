"""Samples laid side by side in one row, so that short ones do not cost a long one's padding.

A sample attends to itself alone, as if it were by itself in the row. The row says where each begins
by positions that start at 0 again, without an attention mask, and what keeps them apart is:

| attention | how |
|---|---|
| `eager`, `sdpa`, `flex_attention` | the mask that transformers makes of the positions |
| `flash_attention_2`, `flash_attention_3` | lengths given to the kernel; the batch is one row |

Anything else, as a model that keeps a state from token to token, is found by `require_separate`
before the first step. This module imports trl at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from preferences.errors import InputError
from training.batches import TokenBatches
from training.hooks import Tokenized
from training.sampling import undisturbed

IGNORED = -100
"""The label of a token that is not scored."""

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class AnswerTrainer(TokenBatches, Tokenized, SFTTrainer):
    """SFTTrainer on answers that are tokens already."""


def packed(rows: Any, max_length: int) -> Any:
    """Rows of `input_ids` and `labels` as fewer rows of at most `max_length` tokens.

    Each row has its samples' `seq_lengths` besides. Best fit, the longest first, a thousand samples
    at a time; none is cut, so none may be longer than `max_length`.
    """
    longest = max(map(len, rows["input_ids"]))
    if longest > max_length:
        raise ValueError(f"a sample of {longest} tokens does not fit a row of {max_length}")
    return pack_dataset(rows.select_columns(["input_ids", "labels"]), max_length, "bfd")


def collator(attention: str, pad: int) -> Collate:
    """Makes batches of packed rows, and ordinary ones of rows that are not packed.

    `attention` is the model's implementation, as in `model.config._attn_implementation`.
    """
    single = DataCollatorForLanguageModeling(pad_token_id=pad)
    # The kernel knows samples only in a batch of one row.
    flat = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=True)
    rows_apart: Collate = flat if "flash" in attention else (lambda rows: _collate(rows, pad))
    return lambda rows: rows_apart(rows) if "seq_lengths" in rows[0] else single(rows)


def _collate(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` and `position_ids`, each of shape (rows, longest).

    Padding has the position 0 at every place: each is a sample of its own and touches no other.
    """
    positions = [torch.cat([torch.arange(n) for n in row["seq_lengths"]]) for row in rows]
    labels = [
        # Nothing before a sample's first token foretells it.
        torch.tensor(row["labels"]).masked_fill(start == 0, IGNORED)
        for row, start in zip(rows, positions, strict=True)
    ]
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "position_ids": pad_sequence(positions, batch_first=True),
    }


def require_separate(model: Any, collate: Collate, bf16: bool = False) -> None:
    """Raises InputError if a sample's logits change with the one that stands before it in the row.

    A model that mixes packed samples trains without a word of complaint, and to something else.
    """
    length = 8
    seen = []
    for before in (range(3, 3 + length), range(3 + length, 3 + 2 * length)):
        ids = [*before, *range(3, 3 + length)]
        # Smaller vocabularies than these numbers need are those of tests.
        ids = [token % model.config.get_text_config().vocab_size for token in ids]
        row = {"input_ids": ids, "labels": ids, "seq_lengths": [length, length]}
        batch = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in collate([row]).items()
            if name != "labels"
        }
        autocast = torch.autocast(model.device.type, torch.bfloat16, bf16)
        with undisturbed(model), torch.no_grad(), autocast:
            seen.append(model(**batch, use_cache=False).logits[0, -length:].float())
    first, second = seen
    if (first - second).abs().max() > 1e-3 * first.abs().max():
        raise InputError(
            f"packing: samples in one row are not kept apart by this model with "
            f"{model.config._attn_implementation} attention; say packing: false"
        )
