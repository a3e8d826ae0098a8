"""What a recipe will take before any of it runs: memory, tokens, time and money.

No weight is loaded, and what is done already is counted too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from flows.recipe import Recipe, load_recipe
from flows.steps import ALIGNMENT
from flows.workload import Work, described, examples_of, workload
from preferences.errors import InputError
from training.settings import TrainingConfig


@dataclass(frozen=True, slots=True)
class Device:
    """What runs here."""

    memory: float
    """Bytes."""
    peak: float | None
    """Products of 16-bit matrices without sparsity, in FLOP/s; None where only its memory is
    known."""


GPUS = {
    "H100": Device(80e9, 989e12),
    "A100": Device(80e9, 312e12),
    "A100-40": Device(40e9, 312e12),
    "L4": Device(24e9, 121e12),
    "4090": Device(24e9, 165e12),
}
"""By their makers' data sheets."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether training some kind of weights fits into the device."""

    weights: str
    needed: float
    """Bytes of a device, at the recipe's batch size."""
    fits: bool
    largest_batch: int | None
    """The most examples at once; None where not even the fewest fit."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """All that is said of a recipe before it runs."""

    recipe: str
    device: str | None
    stages: tuple[Work, ...]
    seconds: tuple[float | None, ...]
    """Of each stage on the device; None where it is not known how fast that is, and at an
    endpoint."""
    price_per_hour: float | None
    """Of the device."""
    training: str | None
    """Of a recipe's trainings, the one that needs the most memory, of which what follows speaks;
    None, as all of that, without an alignment."""
    model: dict[str, Any] | None
    """The shape of the model that is trained."""
    memory: dict[str, float] | None
    """Bytes by what they are; `training`, `load` and `device` are sums."""
    fits: tuple[Fit, ...]
    """The recipe's own weights first; empty without a device."""
    cure: str | None
    """What to change, where they do not fit."""

    @property
    def total_seconds(self) -> float | None:
        """Of all stages that run here; None where that is not known."""
        here = [s for s, w in zip(self.seconds, self.stages, strict=True) if w.is_here]
        known = [s for s in here if s is not None]
        return sum(known) if len(known) == len(here) else None

    @property
    def cost(self) -> float | None:
        """Of endpoints and of the device's hours together; None where a price is not known."""
        prices = [work.price for work in self.stages if not work.is_here]
        known = [price for price in prices if price is not None]
        if len(known) < len(prices) or self.total_seconds is None:
            return None
        if self.price_per_hour is None and self.total_seconds:
            return None
        return sum(known) + self.total_seconds / 3600 * (self.price_per_hour or 0.0)


def estimate(
    recipe: Path,
    settings: Mapping[str, str],
    gpu: str | None = None,
    price_per_hour: float | None = None,
) -> Estimate:
    """What a recipe will take.

    `gpu` is a name, as H100, `cpu`, or a size, as 24GB. Raises InputError where it is neither, and
    where the prompts or a model's configuration cannot be read.
    """
    from training import memory
    from training.models import quiet_libraries

    checked = load_recipe(recipe, settings)
    device = None if gpu is None else device_named(gpu)
    with quiet_libraries():
        stages = tuple(workload(checked))
        rate = device.peak if device else None
        seconds = tuple(w.peak_flops / rate if rate and w.is_here else None for w in stages)
        found = {name: _memory_of(checked, name) for name in checked.trainings}
        if not found:
            return Estimate(
                checked.name, gpu, stages, seconds, price_per_hour, None, None, None, (), None
            )
        # The recipe runs where its largest training does.
        largest = max(found, key=lambda name: found[name][2].device)
        config, (model, shape, held) = _of_one_process(checked, largest), found[largest]
        examples = examples_of(checked, config)
        fits: list[Fit] = []
        cure = None
        for kind in dict.fromkeys((config.weights, *memory.KINDS)) if device else ():
            assert device is not None
            way = config.model_copy(update={"weights": kind})
            needed = held if way == config else memory.training_memory(way, model, shape, examples)
            batch = memory.largest_batch(way, model, shape, needed, device.memory, examples)
            fits.append(Fit(kind, needed.device, needed.device <= device.memory, batch))
        if device and not fits[0].fits:
            cure = memory.cure(config, model, shape, device.memory, examples)
    sizes = ("name", "total", "active", "layers", "hidden", "vocabulary")
    return Estimate(
        checked.name,
        gpu,
        stages,
        seconds,
        price_per_hour,
        largest,
        {name: getattr(shape, name) for name in sizes},
        {**asdict(held), "training": held.training, "device": held.device},
        tuple(fits),
        cure,
    )


def _memory_of(recipe: Recipe, training: str) -> tuple[Any, Any, Any]:
    """A model's configuration, its shape, and the memory that training it takes."""
    from training import memory

    config = _of_one_process(recipe, training)
    found, shape = described(*recipe.model_before(training))
    return found, shape, memory.training_memory(config, found, shape, examples_of(recipe, config))


def _of_one_process(recipe: Recipe, training: str) -> TrainingConfig:
    """A training with the share of its batches that each process has; what a sharding divides
    besides is not counted."""
    config = recipe.trainings[training]
    share = config.batch_size // recipe.runtime.training.processes
    return config.model_copy(update={"batch_size": max(share, 1)})


def estimate_document(
    recipe: Path,
    settings: Mapping[str, str],
    gpu: str | None = None,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """An estimate for a program: bytes, tokens, FLOPs, seconds."""
    found = estimate(recipe, settings, gpu, price_per_hour)
    return {**asdict(found), "total_seconds": found.total_seconds, "cost": found.cost}


def estimate_tables(
    recipe: Path,
    settings: Mapping[str, str],
    gpu: str | None = None,
    price_per_hour: float | None = None,
) -> list[object]:
    """An estimate as tables for a terminal."""
    found = estimate(recipe, settings, gpu, price_per_hour)
    return [_stages(found), *_memory(found), *_fits(found)]


def device_named(text: str) -> Device:
    """A GPU by its name, this machine as `cpu`, or one of which only the size is known."""
    from training.memory import memory_of_device

    named = {name.lower(): device for name, device in GPUS.items()}
    if text.lower() == "cpu":
        return _this_machine()
    if text.lower() in named:
        return named[text.lower()]
    try:
        return Device(memory_of_device(text), None)
    except InputError:
        known = ", ".join([*GPUS, "cpu"])
        raise InputError(f"gpu {text}: not known; name {known}, or give a size as 24GB") from None


def _this_machine() -> Device:
    """Its memory, and how fast it multiplies two matrices now."""
    import torch

    one = torch.ones(1024, 1024)
    torch.mm(one, one)
    started = time.perf_counter()
    for _ in range(5):
        torch.mm(one, one)
    rate = 5 * 2 * 1024**3 / (time.perf_counter() - started)
    return Device(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), rate)


def _stages(found: Estimate) -> Table:
    table = _table(
        f"{found.recipe}: at most", "stage", "calls", "tokens read", "written", "FLOPs", "time"
    )
    for work, seconds in zip(found.stages, found.seconds, strict=True):
        where = "endpoint" if not work.is_here else "" if seconds is None else _time(seconds)
        table.add_row(
            work.name,
            f"{work.calls:,}",
            f"{work.read:,.0f}",
            f"{work.written:,.0f}",
            f"{work.flops:.1e}" if work.is_here else "",
            where if work.price is None else f"{where}, {work.price:,.2f}",
        )
    if found.total_seconds is not None and found.device is not None:
        table.add_row("all", "", "", "", "", _time(found.total_seconds))
    notes = [f"Cost: {found.cost:,.2f}."] if found.cost is not None else []
    if found.device is None:
        notes.append("Name a GPU for times and for what fits.")
    table.caption, table.caption_justify = " ".join(notes) or None, "left"
    return table


PARTS = {
    "weights": "weights",
    "copies": "the frozen copy",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimiser states",
    "activations": "activations of a batch",
    "sampling": "or answering",
    "load": "while loading",
    "training": "at the peak of training",
    "device": "smallest device, with context and gaps",
}


def _memory(found: Estimate) -> list[object]:
    if found.memory is None or found.model is None:
        return []
    name, total = found.model["name"], found.model["total"]
    step = "" if found.training in (None, ALIGNMENT) else f", {found.training}"
    table = _table(f"Memory to train {name} of {total:,} parameters{step}", "what", "GB")
    for part, words in PARTS.items():
        if found.memory[part]:
            table.add_row(words, f"{found.memory[part] / 1e9:,.2f}")
    return [table]


def _fits(found: Estimate) -> list[object]:
    if not found.fits:
        return []
    table = _table(
        f"What fits into {found.device}", "weights", "needs, GB", "fits", "largest batch"
    )
    for fit in found.fits:
        batch = "none" if fit.largest_batch is None else f"{fit.largest_batch:,}"
        table.add_row(fit.weights, f"{fit.needed / 1e9:,.2f}", "yes" if fit.fits else "no", batch)
    if found.cure is not None:
        table.caption, table.caption_justify = f"The recipe does not fit: {found.cure}.", "left"
    return [table]


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table
