"""A QLoRA step of DPO with every token computed once, against TRL's: for a GPU.

    python benchmarks/qlora_speed.py                  # Llama-3.1-8B's shape; 24 GiB and more
    python benchmarks/qlora_speed.py --shape small    # the same code on a CPU, in minutes

The base is random, in NF4 with double quantisation, with a LoRA of rank 16 on all linear layers,
in bfloat16, with paged 8-bit AdamW. Contenders take their steps on the same batches in turn: TRL's
defaults (gradient checkpointing, the reference in the step), TRL at its best (its reference
computed before), and ours with the reference at hand as well; the last two with and without
checkpointing. A contender that does not fit says so in its row.

Seconds are the clock's, after the device has done all its work. Memory is the most that a step
takes beside the weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from dpo_speed import Workload
from table import write_table

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "small": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
NUMBERS = {"cuda": torch.bfloat16, "cpu": torch.float32}
"""Without the instructions for it, a CPU takes minutes for a step in bfloat16."""
WORKLOADS = (Workload(512, 64, 4), Workload(128, 128, 8))


def quantised_model(shape: dict[str, Any], device: str) -> Any:
    """A Llama of random weights whose linear layers are NF4, double quantised, made on the spot."""
    from bitsandbytes import nn
    from transformers import AutoModelForCausalLM, LlamaConfig

    bnb: Any = nn
    make: Any = AutoModelForCausalLM.from_config
    config = LlamaConfig(**shape, max_position_embeddings=8192, pad_token_id=0)
    dtype = NUMBERS[device]
    with torch.device("meta"):
        model = make(config, dtype=dtype)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype) * 0.02

    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        layer = bnb.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = bnb.Params4bit(
            random(module.out_features, module.in_features), quant_type="nf4", requires_grad=False
        )
        layer.weight = weight.to(device)
        model.set_submodule(name, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            norm = parameter.ndim == 1
            value = torch.ones_like(parameter, device=device) if norm else random(*parameter.shape)
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, torch.nn.Parameter(value))
    # Its buffers are a function of the configuration.
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config).to(device)
    model.is_loaded_in_4bit = True
    return model


@dataclass
class Contender:
    """A trainer, how its step is taken, and what was seen of it."""

    name: str
    trainer: Any
    optimizer: Any
    checkpointing: bool
    inline: bool = False
    seconds: list[float] = field(default_factory=list)
    """A pair, by batch."""
    mib: list[float] = field(default_factory=list)

    def step(self, batch: dict[str, Any]) -> None:
        """Loss, gradient and update."""
        trainer, model = self.trainer, self.trainer.model
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        names = ("ref_chosen_logps", "ref_rejected_logps")
        given = {k: v for k, v in batch.items() if not (self.inline and k in names)}
        trainer.precompute_ref_logps = not self.inline
        device = model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = trainer.compute_loss(model, given)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def trainer_of(kind: Any, model: Any, folder: str) -> Any:
    """On a model with a new adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.dpo_config import DPOConfig

    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 2}, "<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
    )
    on_cpu = model.device.type == "cpu"
    return kind(
        model=model,
        args=DPOConfig(
            output_dir=folder,
            max_length=None,
            gradient_checkpointing=False,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(WORKLOADS[0].rows(0)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def contenders(shape: dict[str, Any], device: str, folder: str) -> list[Contender]:
    """Ours, TRL at its best and by default, on two models."""
    from training.labels import PairTrainer
    from training.shared_trainers import SharedPairTrainer

    found = []
    for name, kind in (("ours", SharedPairTrainer), ("TRL", PairTrainer)):
        trainer = trainer_of(kind, quantised_model(shape, device), folder)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        optimizer: Any = torch.optim.AdamW(trained, lr=1e-6)
        if device == "cuda":
            from bitsandbytes import optim

            bnb: Any = optim
            optimizer = bnb.PagedAdamW8bit(trained, lr=1e-6)
        for checkpointing in (True, False):
            how = "checkpointing" if checkpointing else "no checkpointing"
            found.append(Contender(f"{name}, {how}", trainer, optimizer, checkpointing))
    defaults = Contender("TRL, defaults", found[-1].trainer, found[-1].optimizer, True, inline=True)
    return [*found, defaults]


def measured(contender: Contender, batch: dict[str, Any], pairs: int) -> None:
    """One more step; not a number where it does not fit."""
    on_gpu = torch.cuda.is_available()

    def waited(what: Callable[[], int]) -> int:
        return what() if on_gpu else 0

    before = waited(torch.cuda.memory_allocated)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    try:
        contender.step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        contender.seconds.append((time.perf_counter() - started) / pairs)
        contender.mib.append((waited(torch.cuda.max_memory_allocated) - before) / 2**20)
    except torch.OutOfMemoryError:
        contender.seconds.append(float("nan"))
        contender.mib.append(float("nan"))
    if contender.seconds[-1] != contender.seconds[-1]:
        contender.optimizer.zero_grad()
        torch.cuda.empty_cache()


def rows_of(workload: Workload, running: list[Contender]) -> list[list[str]]:
    """Rows of the table; a ratio is to ours with the same checkpointing, batch by batch."""
    ours = {one.checkpointing: one.seconds for one in running if one.name.startswith("ours")}
    rows = []
    for one in running:
        ratios = [a / b for a, b in zip(one.seconds, ours[one.checkpointing], strict=True)]
        fits = all(value == value for value in (*one.seconds, *ratios))
        rows.append(
            [
                str(workload),
                one.name,
                f"{1 / statistics.median(one.seconds):.2f}" if fits else "does not fit",
                f"{max(one.mib) / 1024:.1f}" if fits and any(one.mib) else "",
                f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}-{max(ratios):.2f})"
                if fits
                else "",
            ]
        )
    return rows


def main() -> None:
    """Measure all contenders on both workloads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--repeats", type=int, default=5, help="batches of each workload")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        running = contenders(SHAPES[arguments.shape], device, folder)
        collate = running[0].trainer.data_collator
        for workload in WORKLOADS:
            for one in running:
                one.seconds, one.mib = [], []
            for repeat in range(arguments.repeats + 1):
                batch = {k: v.to(device) for k, v in collate(workload.rows(repeat)).items()}
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    first = running[0].trainer
                    chosen, rejected = first.compute_ref_log_probs(first.model, batch)
                batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
                for one in running:
                    measured(one, batch, workload.pairs)
            for one in running:
                del one.seconds[0], one.mib[0]  # kernels are made at first use
            rows += rows_of(workload, running)
    note = (
        f"Shape {arguments.shape} on "
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}. "
        f"Medians of {arguments.repeats} batches of {WORKLOADS[0].pairs} and {WORKLOADS[1].pairs} "
        "pairs; GiB are beside the weights; ratios are a batch's own, to ours with the same "
        "checkpointing."
    )
    header = ["prompt/answer", "step", "pairs/s", "GiB", "seconds / ours"]
    write_table(f"qlora_speed_{arguments.shape}", header, rows, note)


if __name__ == "__main__":
    main()
