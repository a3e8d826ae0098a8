"""transformers' trainer on blocks of text, which tells losses on new and old texts apart.

This module imports transformers at its head, so it is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer

IGNORED = -100
"""The label of a token that is not scored."""


class TextTrainer(Trainer):
    """Held-out losses of new and of old texts apart, each the mean over its tokens, in nats."""

    sums: Tensor | None = None
    """Of new and old texts in the evaluation that goes on: total loss and tokens."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own loss over all tokens of an update."""
        old = inputs.pop("old")
        inputs["use_cache"] = False
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training:
            found = losses_apart(outputs.logits, inputs["labels"], old)
            found = self.accelerator.reduce(found, "sum")
            self.sums = found if self.sums is None else self.sums + found
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `eval_new_loss` and `eval_old_loss`, where there are such texts."""
        if "eval_loss" in logs and self.sums is not None:
            for origin, (total, tokens) in zip(("new", "old"), self.sums.tolist(), strict=True):
                if tokens:
                    logs[f"eval_{origin}_loss"] = total / tokens
            self.sums = None
        super().log(logs, start_time)


def losses_apart(logits: Tensor, labels: Tensor, old: Tensor) -> Tensor:
    """((loss, tokens) of new, (loss, tokens) of old), each summed, of logits (B, T, vocabulary),
    labels (B, T) and a flag for each row."""
    found = torch.zeros(2, 2, dtype=torch.float64, device=logits.device)
    # Row by row: in float32 the logits of all are the largest thing in memory.
    for row, row_labels, is_old in zip(logits, labels, old.long(), strict=True):
        total = cross_entropy(
            row[:-1].float(), row_labels[1:], ignore_index=IGNORED, reduction="sum"
        )
        tokens = (row_labels[1:] != IGNORED).sum()
        found[is_old] += torch.stack([total.double(), tokens.double()])
    return found


def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
    """Blocks into `input_ids`, `attention_mask`, `labels` and `old`; shorter ones filled at their
    right with what is neither seen nor scored."""
    width = max(len(row["input_ids"]) for row in rows)
    shape = len(rows), width
    ids, present = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
    labels = torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        block = torch.tensor(row["input_ids"])
        ids[i, : len(block)] = labels[i, : len(block)] = block
        present[i, : len(block)] = 1
    old = torch.tensor([bool(row["old"]) for row in rows])
    return {"input_ids": ids, "attention_mask": present, "labels": labels, "old": old}


def text_losses(model: Any, rows: Any, batch_size: int, bf16: bool) -> Tensor:
    """As `losses_apart`, over all rows, on the CPU."""
    found = torch.zeros(2, 2, dtype=torch.float64)
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, bf16):
        for start in range(0, len(rows), batch_size):
            part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch = {name: value.to(device) for name, value in collate(part).items()}
            labels, old = batch.pop("labels"), batch.pop("old")
            found += losses_apart(model(**batch, use_cache=False).logits, labels, old).cpu()
    return found
