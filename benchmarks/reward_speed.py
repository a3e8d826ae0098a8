"""A reward model's step with every token computed once, against TRL's.

    OMP_NUM_THREADS=1 python benchmarks/reward_speed.py

A step is the loss with its metrics, the backward pass and AdamW, on the model, the LoRA and the
lengths of `dpo_speed.py`, with a head that trains in place of the language head. Contenders take it
on the same pairs in turn: ours with shared prompts; TRL's RewardTrainer; and ours as it is where
prompts cannot be shared, with several answers packed into a row. Seconds and activations are
counted as there. Before, losses are compared.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from dpo_speed import SHAPE, SPREAD, WORKLOADS, Contender, Workload, over, seconds, spread
from table import write_table


def trainer_of(kind: Any, folder: str) -> Any:
    """On the same model, drawn anew."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl.trainer.reward_config import RewardConfig

    from training.reward_head import read_at_ends

    torch.manual_seed(0)
    fast: Any = PreTrainedTokenizerFast
    shape: dict[str, Any] = {**SHAPE, "num_labels": 1}
    make: Any = LlamaForSequenceClassification
    model = make(LlamaConfig(**shape))
    read_at_ends(model, packing=True)  # called as TRL calls it, it computes what it did
    return kind(
        model=model,
        args=RewardConfig(
            output_dir=folder,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows_of(WORKLOADS[0], 0)),
        processing_class=fast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 2}, "<pad>")),
            pad_token="<pad>",
            eos_token="<end>",
        ),
        peft_config=LoraConfig(
            r=16, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
        ),
    )


def rows_of(workload: Workload, seed: int) -> list[dict[str, Any]]:
    """A batch for ours, of certain labels."""
    certain = {"probability": 1.0, "weight": 1.0, "margin": 0.0}
    return [{**row, **certain} for row in workload.rows(seed)]


def batch_of(contender: Contender, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As the contender's collator makes it; TRL's reads answers with their prompts before them."""
    if contender.name != "TRL":
        made: dict[str, Any] = contender.trainer.data_collator(rows)
        return made
    whole = [
        {f"{n}_ids": row["prompt_ids"] + row[f"{n}_ids"] for n in ("chosen", "rejected")}
        for row in rows
    ]
    return dict(contender.trainer.data_collator(whole))


def contenders(folder: str) -> list[Contender]:
    """Ours, TRL's, and ours without sharing."""
    from trl.trainer.reward_trainer import RewardTrainer

    from training.hooks import Tokenized
    from training.reward_trainer import PairRewardTrainer, collator

    class TokenizedRewardTrainer(Tokenized, RewardTrainer):
        """TRL's on pairs that are tokens already."""

    kinds = {
        "ours": PairRewardTrainer,
        "TRL": TokenizedRewardTrainer,
        "ours, packed": PairRewardTrainer,
    }
    made = []
    for name, kind in kinds.items():
        trainer = trainer_of(kind, folder)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        made.append(Contender(name, trainer, torch.optim.AdamW(trained, lr=1e-6)))
    if not made[0].trainer.share():
        raise SystemExit("prompts are not shared")
    made[2].trainer.data_collator = collator(packing=True, width=0)
    return made


def require_equal(running: list[Contender], rows: list[dict[str, Any]]) -> None:
    """All contenders have the same loss, so they do the same work."""
    losses = [
        float(one.trainer.compute_loss(one.trainer.model, batch_of(one, rows)).detach())
        for one in running
    ]
    if max(losses) - min(losses) > 1e-4:
        raise SystemExit(f"losses differ: {losses}")


def main() -> None:
    """Measure; the table is written after each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="batches of each workload")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        running = contenders(folder)
        require_equal(running, rows_of(Workload(40, 20, 4), 0))
        took: dict[Workload, list[list[float]]] = {w: [[] for _ in running] for w in WORKLOADS}
        kept: dict[Workload, list[list[float]]] = {}
        for repeat in range(repeats):
            for workload, columns in took.items():
                rows = rows_of(workload, repeat)
                batches = [batch_of(one, rows) for one in running]
                for one, batch, column in zip(running, batches, columns, strict=True):
                    column.append(seconds(one.step, batch) / workload.pairs)
                if workload not in kept:
                    kept[workload] = [
                        [one.kept(batch) / 2**20]
                        for one, batch in zip(running, batches, strict=True)
                    ]
            tell(running, took, kept)


def tell(
    running: list[Contender],
    took: dict[Workload, list[list[float]]],
    kept: dict[Workload, list[list[float]]],
) -> None:
    """Write the table of what is measured so far."""
    rows = [
        [
            f"{workload}: {what}",
            *map(spread, columns),
            *(over(column, columns[0]) for column in columns[1:]),
        ]
        for workload in took
        for what, columns in (
            ("s a pair", took[workload]),
            ("MiB kept, first batch", kept[workload]),
        )
    ]
    header = [
        "prompt/answer",
        *(one.name for one in running),
        *(f"{one.name} / ours" for one in running[1:]),
    ]
    note = (
        f"Medians of {len(took[WORKLOADS[0]][0])} batches, with the least and the most; ratios are "
        "a batch's own. Batches of 3, 6 and 6 pairs; lengths of prompts and of answers are "
        f"lognormal with the mean given and σ {SPREAD}."
    )
    write_table("reward_speed", header, rows, note)


if __name__ == "__main__":
    main()
