"""A language model that is a table: it can say 85 things, and give them any probabilities.

What it can say are all sequences of up to three of four words, 1 + 4 + 16 + 64. Its hidden state
is one-hot in what was said so far, so the weights of its head are its logits. Whatever trains it,
where training should end is known in closed form.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from tests.training.conftest import build_tokenizer

WORDS = ("red", "blue", "green", "white")
ANSWERS = [" ".join(said) for n in range(4) for said in itertools.product(WORDS, repeat=n)]
STATES = {answer: state for state, answer in enumerate(ANSWERS)}
"""Of what was said so far; the state of word w after state s is 4·s + 1 + w."""
ELSEWHERE = len(ANSWERS)
"""The state of every place that is not in an answer."""

TOKENIZER = build_tokenizer()
START, END = TOKENIZER.convert_tokens_to_ids(["<assistant>", "<end>"])
WORD_IDS = TOKENIZER.convert_tokens_to_ids(list(WORDS))

_CHANCE = random.Random(5)
REWARD = {answer: _CHANCE.gauss(0, 0.5) for answer in ANSWERS}

Table = NDArray[np.float64]
"""Logits of shape (states, vocabulary)."""


class TabularConfig(PreTrainedConfig):
    model_type = "tabular_lm"
    vocab_size = len(TOKENIZER)
    hidden_size = len(ANSWERS) + 1


class Prefixes(PreTrainedModel):
    """Hidden states: one-hot in what the assistant has said so far."""

    config_class = TabularConfig

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.register_buffer("identity", torch.eye(config.hidden_size))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPast:
        state = torch.full_like(input_ids[:, 0], ELSEWHERE)
        word_of = torch.full((TabularConfig.vocab_size,), -1, device=input_ids.device)
        word_of[WORD_IDS] = torch.arange(len(WORDS), device=input_ids.device)
        states = []
        for token in input_ids.T:
            word = word_of[token]
            goes_on = (word >= 0) & (len(WORDS) * state + 1 + word < ELSEWHERE)
            state = torch.where(goes_on, len(WORDS) * state + 1 + word, ELSEWHERE)
            state = torch.where(token == START, 0, state)
            states.append(state)
        return BaseModelOutputWithPast(
            last_hidden_state=self.get_buffer("identity")[torch.stack(states, dim=1)]
        )


class TabularLM(PreTrainedModel, GenerationMixin):
    config_class = TabularConfig
    base_model_prefix = "model"

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = Prefixes(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids).last_hidden_state))


AutoConfig.register("tabular_lm", TabularConfig, exist_ok=True)
AutoModelForCausalLM.register(TabularConfig, TabularLM, exist_ok=True)


def random_table(seed: int) -> Table:
    """Normal logits for what may follow in each state, and impossibility for all else."""
    chance = np.random.default_rng(seed)
    table = np.full((len(ANSWERS) + 1, TabularConfig.vocab_size), -1e9)
    for state in range(len(ANSWERS)):
        longest = len(WORDS) * state + 1 >= len(ANSWERS)
        allowed = [END] if longest else [*WORD_IDS, END]
        table[state, allowed] = chance.normal(size=len(allowed))
    table[ELSEWHERE, END] = 0
    return table


def write_table(folder: Path, table: Table) -> str:
    """The model of a table, with its tokenizer."""
    model = TabularLM(TabularConfig(pad_token_id=0, eos_token_id=END))
    model.lm_head.weight.data = torch.tensor(table.T, dtype=torch.float32).contiguous()
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def read_table(weight: Tensor) -> Table:
    """The table of a head's weights."""
    found: Table = weight.detach().double().numpy().T.copy()
    return found


def steps(answer: str) -> list[tuple[int, int]]:
    """The (state, token) of every token of an answer, its end with it."""
    said = answer.split()
    before = [STATES[" ".join(said[:n])] for n in range(len(said) + 1)]
    return list(zip(before, [*(WORD_IDS[WORDS.index(w)] for w in said), END], strict=True))


def log_probs(table: Table) -> dict[str, float]:
    """log π(answer) of every answer, in nats."""
    top = table.max(axis=1, keepdims=True)
    choices = table - top - np.log(np.exp(table - top).sum(axis=1, keepdims=True))
    return {answer: math.fsum(choices[at] for at in steps(answer)) for answer in ANSWERS}


def optimum(reference: Mapping[str, float], beta: float) -> dict[str, float]:
    """log π* of every answer, with π* ∝ π_ref·exp(r/β) (Rafailov et al. 2023, eq. 4)."""
    scores = {answer: log_p + REWARD[answer] / beta for answer, log_p in reference.items()}
    top = max(scores.values())
    total = top + math.log(math.fsum(math.exp(score - top) for score in scores.values()))
    return {answer: score - total for answer, score in scores.items()}


def kl(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """KL(ours‖theirs) in nats, of distributions given as log-probabilities."""
    return math.fsum(math.exp(p) * (p - theirs[answer]) for answer, p in ours.items())


def probability(chosen: str, rejected: str) -> float:
    """P(chosen beats rejected) by Bradley and Terry, from the true rewards."""
    return 1 / (1 + math.exp(REWARD[rejected] - REWARD[chosen]))


def some_pairs(rounds: int) -> list[tuple[str, str]]:
    """Every answer before another and behind another, in so many random rounds: all hang together
    closely, so that no difference takes long to learn."""
    chance = random.Random(2)
    pairs: list[tuple[str, str]] = []
    for _ in range(rounds):
        order = chance.sample(ANSWERS, len(ANSWERS))
        pairs += itertools.pairwise([*order, order[0]])
    return pairs


def write_pairs(folder: Path, pairs: list[tuple[str, str]], **columns: list[Any]) -> Path:
    """A training split of pairs with exact probabilities; `columns` replace or add to theirs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "prompt": [{"role": "user", "content": "paint thing0"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "prompt_id": f"p{i}",
            "chosen_id": f"c{i}",
            "rejected_id": f"r{i}",
            "probability": probability(chosen, rejected),
            "margin": REWARD[chosen] - REWARD[rejected],
            **{name: values[i] for name, values in columns.items()},
        }
        for i, (chosen, rejected) in enumerate(pairs)
    ]
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000.parquet")
    return folder
