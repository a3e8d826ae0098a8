"""What the shared forward pass keeps for the backward pass: predicted against counted.

    OMP_NUM_THREADS=1 python benchmarks/memory_kept.py

Counted as `benchmarks/dpo_speed.py` does it, on its model and its batches: bytes of the different
tensors that autograd saves in a DPO step on a CPU, without the weights. Predicted by
`training.rehearsal` from the model's configuration and the lengths of the same batches.
"""

from __future__ import annotations

import tempfile

import torch
from dpo_speed import SHAPE, WORKLOADS, contenders
from table import write_table
from transformers import LlamaConfig

from training.adapters import LoraConfig, WeightsConfig
from training.rehearsal import Pass, rehearse, shared_head
from training.shared_prefix import shared

MIB = 2.0**20


def main() -> None:
    """Count, predict and tell."""
    torch.set_num_threads(1)
    shape = LlamaConfig(**SHAPE)  # type: ignore[arg-type]
    weights = WeightsConfig(weights="lora", lora=LoraConfig(rank=16))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ours = contenders(folder)[0]
        for workload in WORKLOADS:
            batch = ours.trainer.data_collator(workload.rows(0))
            chosen, rejected = ours.reference(batch)
            at_hand = {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            counted = ours.kept(at_hand)
            segments = shared(batch["input_ids"], batch["attention_mask"], 2).segments
            tokens, scored = sum(segments.own), int(batch["completion_mask"][:, 1:].sum())
            shown = Pass(
                1,
                tokens,
                checkpointing=False,
                autocast=False,
                segments=segments,
                on_gpu=False,
            )
            head = shared_head(scored, None, on_gpu=False)
            kept = rehearse(shape, weights, shown, head, "float32").kept
            told = (f"{tokens:,}", f"{scored:,}", f"{kept / MIB:.1f}", f"{counted / MIB:.1f}")
            rows.append((str(workload), *told, f"{kept / counted - 1:+.1%}"))
    header = ("prompt/answer", "tokens", "scored", "predicted, MiB", "counted, MiB", "off by")
    write_table("memory_kept", header, rows)


if __name__ == "__main__":
    main()
