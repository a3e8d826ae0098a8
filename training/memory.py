"""What a training run will hold in memory, before anything is loaded.

Weights, gradients and optimiser states are counted: numbers of parameters times bytes. Activations
are rehearsed (`training.rehearsal`). There are three constants that are neither, below. All sizes
are in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from preferences.errors import InputError
from training.models import is_quantised
from training.rewarded import RewardedConfig
from training.settings import TrainingConfig
from training.shape import Shape

CONTEXT = 0.5e9
"""For CUDA's context, loaded kernels and cuBLAS's workspace (32 MiB on Hopper, 8 MiB elsewhere): an
allowance, since it differs by driver and card. No framework's own figures have it in."""
SPARE = 0.05
"""Share of a GPU left for what the allocator cannot use: gaps between blocks."""
BLOCK, STATISTICS_BLOCK = 64, 256
"""Weights that share a scale in NF4, and scales that share one of their own where they are
quantised once more (Dettmers et al. 2023, section 3)."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATES = {"adamw": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 0.0, "adafactor": 0.0}
"""Bytes of optimiser state for each trained parameter: two moments, in float32, in one byte, in
the host's memory when the GPU's is short, or as sums of rows and columns."""

ANSWERS = {"dpo": 2, "orpo": 2, "reward": 2}
"""Answers that an example of a batch has, where that is not one: chosen and rejected."""
LOOKS = 3
"""How often a batch that fits is corrected."""
KINDS = ("full", "lora", "qlora")
"""Weights that are compared when it is asked what fits."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What is known of a method's examples before there are any."""

    answers: int
    """To each prompt, in one example."""
    answer: int | None = None
    """Most tokens of an answer; None where it may have all that `max_length` allows."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is on the device at the fullest moment, by what it is."""

    weights: float
    """Of the base model, as it is held in training."""
    copies: float
    """Of other models beside it: the frozen one of PPO on full weights."""
    adapter: float
    """Of what trains, where it is not the weights themselves."""
    gradients: float
    optimizer: float
    activations: float
    """Of one batch forward and backward, with temporary tensors and gradients' copies."""
    sampling: float
    """The key-value cache and logits while the policy answers; not at the same time as the former.
    """
    load: float
    """The most that is held while the weights are loaded."""

    @property
    def training(self) -> float:
        """The most that tensors take in training, as `torch.cuda.max_memory_allocated` tells it."""
        fixed = self.weights + self.copies + self.adapter + self.gradients + self.optimizer
        return fixed + max(self.activations, self.sampling)

    @property
    def device(self) -> float:
        """The smallest memory of a device on which the run goes through."""
        return (max(self.training, self.load) + CONTEXT) / (1 - SPARE)


def weight_bytes(shape: Shape, dtype: str, quantised: bool, double: bool = True) -> float:
    """Of the loaded base model, in `dtype` or in NF4 with the rest of it in `dtype`."""
    if not quantised:
        return shape.total * BYTES[dtype]
    packed = sum(nf4_bytes(n, double) for n in shape.quantised_layers)
    return packed + (shape.total - shape.linear) * BYTES[dtype]


def nf4_bytes(parameters: int, double: bool = True) -> float:
    """Of one NF4 layer: half a byte a weight, and its scales, in float32 or again quantised.

    Double quantisation makes 0.5 bit a weight into 8/64 + 32/(64·256) = 0.127: it saves 0.373.
    """
    blocks = math.ceil(parameters / BLOCK)
    codes = 4 * 16
    if not double:
        return parameters / 2 + 4 * blocks + codes
    scales = blocks + 4 * math.ceil(blocks / STATISTICS_BLOCK)
    return parameters / 2 + scales + codes + 4 * 256 + 4


def training_memory(
    config: TrainingConfig, model: Any, shape: Shape, examples: Examples | None = None
) -> Memory:
    """The memory of a run, on one device. `model` is the model's configuration of transformers.

    Every prompt with an answer is taken to be as long as `max_length` allows, and the answer as
    long as it may be. Raises InputError where the model has nothing of the kind that is to train.
    """
    from training import passes, rehearsal

    examples = examples or Examples(ANSWERS.get(config.method, 1))
    quantised, full = is_quantised(config.weights), config.weights == "full"
    dtype = "float32" if full else config.dtype
    loaded = weight_bytes(shape, dtype, quantised)
    weights = loaded
    if quantised:
        # peft's preparation for training on 4 bits makes float32 of all that is not packed.
        weights += (shape.total - shape.linear) * (BYTES["float32"] - BYTES[dtype])
    sampled, copied = 0, False
    if isinstance(config, RewardedConfig):
        sampled = min(config.rollouts, config.sampling_batch_size)
        copied = config.keeps_start
    shown, head = passes.pass_of(config, model, examples)
    held = rehearsal.rehearse(model, config, shown, head, config.dtype)
    largest = max(shape.quantised_layers, default=0) if quantised else 0
    return Memory(
        weights=weights,
        copies=loaded if full and copied else 0.0,
        adapter=0.0 if full else 4 * held.trained,
        gradients=4 * held.trained,
        optimizer=STATES[getattr(config, "optimizer", "adamw")] * held.trained,
        activations=held.activations,
        sampling=_sampling(config, shape, sampled),
        load=loaded + largest * BYTES[dtype],
    )


def largest_batch(
    config: TrainingConfig,
    model: Any,
    shape: Shape,
    held: Memory,
    device: float,
    examples: Examples | None = None,
) -> int | None:
    """About how many examples at once fit into so many bytes; None where not the fewest do.

    `held` is the run's memory as it is configured. Each example more is taken to add what each of
    a batch twice as large adds, and a batch found far from there is the next one looked at: what
    the head takes grows up to a tile only.
    """
    room = device * (1 - SPARE) - CONTEXT
    if held.load > room:
        return None
    if config.batch_tokens is not None:
        config = config.model_copy(update={"batch_tokens": None})
        held = training_memory(config, model, shape, examples)
    batch, taken = config.batch_size, held.training
    for _ in range(LOOKS):
        more = _training_bytes(config, model, shape, 2 * batch, examples)
        each = max((more - taken) / batch, 1.0)
        found = batch + math.floor((room - taken) / each)
        if found < smallest_batch(config):
            return None
        if found <= 2 * batch:
            return found
        batch, taken = found, _training_bytes(config, model, shape, found, examples)
    return batch


def _training_bytes(
    config: TrainingConfig, model: Any, shape: Shape, batch: int, examples: Examples | None
) -> float:
    tried = config.model_copy(update={"batch_size": batch})
    return training_memory(tried, model, shape, examples).training


def smallest_batch(config: TrainingConfig) -> int:
    """The fewest examples at once that the method trains with."""
    return 2 if config.method == "kto" else 1


def cure(
    config: TrainingConfig,
    model: Any,
    shape: Shape,
    device: float,
    examples: Examples | None = None,
) -> str:
    """What to change so that a run fits into so many bytes, the least harmful first."""
    tried: list[tuple[str, dict[str, Any]]] = []
    smallest = smallest_batch(config)
    if config.batch_tokens is not None:
        fewest = min(config.batch_tokens, config.max_length)
        tried.append((f"batch_tokens: {fewest}, which trains the same", {"batch_tokens": fewest}))
    elif config.batch_size > smallest:
        accumulation = math.ceil(config.batch_size * config.accumulation / smallest)
        tried.append(
            (
                f"batch_size: {smallest} with accumulation: {accumulation}, which trains the same",
                {"batch_size": smallest, "accumulation": accumulation},
            )
        )
    if not config.gradient_checkpointing:
        tried.append(("gradient_checkpointing: true", {"gradient_checkpointing": True}))
    if config.weights == "full":
        tried.append(("optimizer: adamw_8bit", {"optimizer": "adamw_8bit"}))
        tried.append(("weights: lora", {"weights": "lora"}))
    if not is_quantised(config.weights):
        tried.append(("weights: qlora", {"weights": "qlora"}))
    if config.max_length > 512:
        tried.append(("max_length: 512", {"max_length": 512}))
    said: list[str] = []
    changed = config
    for words, update in tried:
        known = {k: v for k, v in update.items() if k in type(config).model_fields}
        if not known:
            continue
        changed = changed.model_copy(update=known)
        said = [s for s in said if not (words.startswith("weights") and _gives_way(s))] + [words]
        if training_memory(changed, model, shape, examples).device <= device:
            return "say " + ", ".join(said)
    return "no setting is enough: take a smaller model or a larger GPU"


def _gives_way(words: str) -> bool:
    return words.startswith(("weights", "optimizer"))


def memory_of_device(text: str) -> float:
    """`24GB` or `24 GiB` as bytes; InputError where it is no such thing."""
    plain = text.strip().lower().replace(" ", "")
    for unit, size in (("gib", 2.0**30), ("gb", 1e9)):
        number = plain.removesuffix(unit)
        if number != plain:
            try:
                found = float(number) * size
            except ValueError:
                break
            if found > 0:
                return found
    raise InputError(f"{text}: not a size of memory; write it as 24GB or 22.5GiB")


def _sampling(config: TrainingConfig, shape: Shape, rows: int) -> float:
    cache = rows * config.max_length * shape.kv_size * BYTES[config.dtype]
    return cache + rows * shape.vocabulary * BYTES["float32"] * 2
