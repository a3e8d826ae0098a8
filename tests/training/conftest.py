"""A tiny world: a Llama of 30,000 parameters that answers in colours, made on the spot."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads cost more than they bring on matrices this small, and one thread is deterministic.
os.environ["OMP_NUM_THREADS"] = "1"

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from preferences.records import Messages
from training.dpo import DPOConfig
from training.loop import train
from training.probe import ProbeConfig
from training.run import TrainingResult, TrainingRuntime
from training.settings import TrainingConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own: one that plants a fault does not leave it to the next."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


COLOURS = ("red", "blue", "green", "white", "black")
THINGS = tuple(f"thing{i}" for i in range(48))

# A newline after the end token, as many real templates have.
TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Pair = tuple[str, str, str]
"""Prompt, chosen, rejected."""


def answer(chance: random.Random) -> str:
    """What the tiny model was trained to say: two to five colours."""
    return " ".join(chance.choices(COLOURS, k=chance.randint(2, 5)))


def build_tokenizer(template: str | None = TEMPLATE) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<bos>", "<end>", "<user>", "<assistant>", "<system>"]
    words = [*special, "\n", "paint", *COLOURS, *THINGS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.add_tokens(["\n"])
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<end>",
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny model, trained for a second to answer with colours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.set_num_threads(1)
    policy = LlamaForCausalLM(shape)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    chance = random.Random(0)
    for _ in range(120):
        texts = [
            f"<bos><user>paint {chance.choice(THINGS)}<end>\n<assistant>{answer(chance)}<end>"
            for _ in range(32)
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = policy(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("model")
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_split(folder: Path, split: str, pairs: Sequence[Pair]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "prompt_id": f"p-{prompt}",
            "chosen_id": f"c{i}",
            "rejected_id": f"r{i}",
            "probability": 0.9,
            "margin": 2.0,
        }
        for i, (prompt, chosen, rejected) in enumerate(pairs)
    ]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000.parquet")


def pairs_preferring(chosen: str, number: int, things: Sequence[str]) -> list[Pair]:
    chance = random.Random(1)
    return [(f"paint {things[i % len(things)]}", chosen, answer(chance)) for i in range(number)]


@pytest.fixture(scope="session")
def red_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pairs and 24 held-out ones whose chosen answer is always `red red`."""
    folder = tmp_path_factory.mktemp("red")
    write_split(folder, "train", pairs_preferring("red red", 48, THINGS[:24]))
    write_split(folder, "test", pairs_preferring("red red", 24, THINGS[24:]))
    return folder


QUICK: dict[str, Any] = {
    "learning_rate": 2e-3,
    "batch_size": 4,
    "max_steps": 16,
    "max_length": 48,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "eval_steps": 8,
    "schedule": "constant",
    "warmup_share": 0,
}
"""Settings by which the tiny model learns in seconds."""


@pytest.fixture
def make_config(model: str) -> Callable[..., DPOConfig]:
    """A configuration for the tiny model; keyword arguments change fields."""
    probe = ProbeConfig(
        every=8,
        prompts=24,
        max_tokens=12,
        max_malformed=0.9,
        max_length_rate=0.9,
        min_win_rate=0,
        patience=2,
    )
    defaults = {**QUICK, "model": model, "beta": 0.3, "probe": probe}
    return lambda **changes: DPOConfig(**{**defaults, **changes})


@pytest.fixture
def runtime() -> TrainingRuntime:
    return TrainingRuntime(log_steps=4, save_steps=8)


def reds(text: str) -> float:
    words = text.split()
    return words.count("red") / len(words) if words else 0.0


def redder_wins(
    prompts: Sequence[Messages], responses: Sequence[str], references: Sequence[str]
) -> list[float | None]:
    """A judge who likes red: 1 where the response has the larger share of it, 0.5 for a tie."""
    return [
        0.5 + 0.5 * ((reds(ours) > reds(theirs)) - (reds(ours) < reds(theirs)))
        for ours, theirs in zip(responses, references, strict=True)
    ]


@pytest.fixture
def red_judge() -> Any:
    return redder_wins


def silent(step: int, steps: int, metrics: Mapping[str, float]) -> None:
    """A progress function that shows nothing."""


def saved_weights(run: Path, result: TrainingResult) -> dict[str, Any]:
    from safetensors.torch import load_file

    name = "adapter_model" if result.saved == "adapter" else "model"
    return dict(load_file(run / result.saved / f"{name}.safetensors"))


def equal(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    import torch

    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


EVERY_FOUR = TrainingRuntime(log_steps=4, save_steps=4)


class Stop(Exception):
    """The end of a run that somebody killed."""


def assert_an_interruption_changes_nothing(
    config: TrainingConfig, dataset: Path, folder: Path
) -> None:
    """Of a run that ends after step 10, between two checkpoints, and is started again."""
    whole, broken = folder / "whole", folder / "broken"
    expected = train(config, dataset, whole, EVERY_FOUR, progress=silent)
    steps: list[int] = []

    def stop_once(step: int, steps_in_all: int, metrics: Mapping[str, float]) -> None:
        steps.append(step)
        if steps == list(range(1, 11)):
            raise Stop

    with pytest.raises(Stop):
        train(config, dataset, broken, EVERY_FOUR, progress=stop_once)
    result = train(config, dataset, broken, EVERY_FOUR, progress=stop_once)
    assert steps == [*range(1, 11), *range(9, expected.steps + 1)]
    assert result == expected
    assert equal(saved_weights(broken, result), saved_weights(whole, expected))
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
