"""A DPO step with every token computed once, against TRL's.

    OMP_NUM_THREADS=1 python benchmarks/dpo_speed.py

A step is TRL's whole loss with its metrics, the backward pass and AdamW, on a Llama of ten million
random weights in about SmolLM2-135M's proportions, with a LoRA of rank 16 on all linear layers, in
float32, without checkpointing. Contenders take it on the same batch in turn: ours, TRL's as it is
on a CPU, and TRL's with the logits of answers' tokens alone, as it is on a GPU. With the reference
at hand, its log-probabilities were computed before; the pass that computes them is a row of its
own, and a step with the reference in it is the sum of both, which is what such a step does.

Seconds are the process's, which other load on the machine changes less than it changes a clock's.
Activations are the bytes of different tensors that autograd keeps for the backward pass, without
the weights.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from table import write_table

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPREAD = 0.5
"""Standard deviation of the logarithms of lengths."""


@dataclass(frozen=True)
class Workload:
    """Pairs with prompts and answers of so many tokens, on average."""

    prompt: int
    answer: int
    pairs: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.answer}"

    def rows(self, seed: int) -> list[dict[str, Any]]:
        """A batch."""
        chance = random.Random(f"{self}:{seed}")

        def ids(mean: int) -> list[int]:
            length = max(1, round(chance.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD)))
            return [chance.randrange(3, SHAPE["vocab_size"]) for _ in range(length)]

        return [
            {
                "prompt_ids": ids(self.prompt),
                "chosen_ids": ids(self.answer),
                "rejected_ids": ids(self.answer),
            }
            for _ in range(self.pairs)
        ]


WORKLOADS = (Workload(384, 64, 3), Workload(128, 128, 6), Workload(32, 256, 6))


@contextmanager
def answers_only(active: bool) -> Iterator[None]:
    """Inside, TRL computes the logits of answers' tokens alone."""
    if not active:
        yield
        return
    with mock.patch("trl.trainer.utils._use_triton", return_value=True):
        yield


@dataclass
class Contender:
    """A trainer and how its step is taken."""

    name: str
    trainer: Any
    optimizer: Any
    compact: bool = False

    def step(self, batch: dict[str, Any]) -> None:
        """Loss, gradient and update."""
        self.trainer.precompute_ref_logps = "ref_chosen_logps" in batch
        with answers_only(self.compact):
            self.trainer.compute_loss(self.trainer.model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reference(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of both answers under the reference."""
        with answers_only(self.compact):
            chosen, rejected = self.trainer.compute_ref_log_probs(self.trainer.model, batch)
        return chosen, rejected

    def kept(self, batch: dict[str, Any]) -> int:
        """Bytes that wait for the backward pass."""
        weights = {p.untyped_storage().data_ptr() for p in self.trainer.model.parameters()}
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.trainer.precompute_ref_logps = True
        with answers_only(self.compact), torch.autograd.graph.saved_tensors_hooks(keep, keep):
            loss = self.trainer.compute_loss(self.trainer.model, batch)
        total = sum(found.values())
        loss.backward()
        self.optimizer.zero_grad()
        return total


def trainer_of(kind: Any, folder: str) -> Any:
    """On the same model, drawn anew."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    from trl.trainer.dpo_config import DPOConfig

    torch.manual_seed(0)
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 2}, "<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
    )
    make: Any = AutoModelForCausalLM.from_config
    return kind(
        model=make(LlamaConfig(**SHAPE)),  # type: ignore[arg-type]
        args=DPOConfig(
            output_dir=folder,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(WORKLOADS[0].rows(0)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def contenders(folder: str) -> list[Contender]:
    """Ours, TRL's, and TRL's with logits of answers alone."""
    from training.labels import PairTrainer
    from training.shared_trainers import SharedPairTrainer

    made = []
    for name, kind in (("ours", SharedPairTrainer), ("TRL", PairTrainer)):
        trainer = trainer_of(kind, folder)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        made.append(Contender(name, trainer, torch.optim.AdamW(trained, lr=1e-6)))
    trl = made[-1]
    return [*made, Contender("TRL, answers' logits", trl.trainer, trl.optimizer, compact=True)]


def seconds(what: Callable[[Any], Any], given: Any) -> float:
    """Of this process."""
    started = time.process_time()
    what(given)
    return time.process_time() - started


@dataclass
class Measured:
    """One contender's figures on one workload, a batch each."""

    at_hand: list[float] = field(default_factory=list)
    """Seconds a pair of a step whose reference was computed before."""
    alone: list[float] = field(default_factory=list)
    """Seconds a pair of computing the reference."""
    kept: list[float] = field(default_factory=list)
    """MiB."""

    def both(self) -> list[float]:
        """Seconds a pair of a step with the reference in it."""
        return [a + b for a, b in zip(self.at_hand, self.alone, strict=True)]


def measure(workload: Workload, running: list[Contender], found: list[Measured]) -> None:
    """Another batch, on which all contenders run in turn; activations are looked at once."""
    repeat = len(found[0].alone)
    batch = running[0].trainer.data_collator(workload.rows(repeat))
    chosen, rejected = running[0].reference(batch)
    at_hand = {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    for one, figures in zip(running, found, strict=True):
        figures.alone.append(seconds(one.reference, batch) / workload.pairs)
        figures.at_hand.append(seconds(one.step, at_hand) / workload.pairs)
        if not figures.kept:
            figures.kept.append(one.kept(at_hand) / 2**20)


def rows_of(workload: Workload, found: list[Measured]) -> list[list[str]]:
    """Rows of the table."""
    return [
        [
            f"{workload}: {what}",
            *(spread(figures) for figures in columns),
            *(over(figures, columns[0]) for figures in columns[1:]),
        ]
        for what, columns in (
            ("s a pair, reference at hand", [each.at_hand for each in found]),
            ("s a pair, reference in the step", [each.both() for each in found]),
            ("s a pair, reference alone", [each.alone for each in found]),
            ("MiB kept, first batch", [each.kept for each in found]),
        )
    ]


def spread(values: list[float]) -> str:
    """Median, least and most."""
    told = f"{statistics.median(values):.3g}"
    return told if len(values) == 1 else f"{told} ({min(values):.3g}-{max(values):.3g})"


def over(theirs: list[float], ours: list[float]) -> str:
    """Theirs divided by ours, batch by batch."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    told = f"{statistics.median(ratios):.2f}×"
    return told if len(ratios) == 1 else f"{told} ({min(ratios):.2f}-{max(ratios):.2f})"


def tell(found: dict[Workload, list[Measured]], running: list[Contender]) -> None:
    """Write the table of what is measured so far."""
    repeats = len(next(iter(found.values()))[0].alone)
    note = (
        f"Medians of {repeats} batches, with the least and the most; ratios are a batch's own. "
        "Batches of 3, 6 and 6 pairs; lengths of prompts and of answers are lognormal with the "
        f"mean given and σ {SPREAD}."
    )
    header = [
        "prompt/answer",
        *(one.name for one in running),
        *(f"{one.name} / ours" for one in running[1:]),
    ]
    rows = [row for workload, each in found.items() for row in rows_of(workload, each)]
    write_table("dpo_speed", header, rows, note)


def main() -> None:
    """Measure; the table is written after each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="batches of each workload")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        running = contenders(folder)
        for one in running:
            one.step(running[0].trainer.data_collator(Workload(16, 8, 1).rows(0)))
        found = {workload: [Measured() for _ in running] for workload in WORKLOADS}
        for _ in range(repeats):
            for workload, each in found.items():
                measure(workload, running, each)
            tell(found, running)


if __name__ == "__main__":
    main()
