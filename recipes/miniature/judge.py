"""The judge: started from the policy, trained to read two answers and say A or B."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from answers import draw_answer, spoil
from fitting import fit
from policy import chat_tokens, pad, sample, save
from tokenizer import judge_text, token_id
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from world import Task, tasks, true_reward

PAIRS, BATCH, STEPS, LEARNING_RATE = 24_000, 64, 700, 1.5e-3
SAMPLES_PER_PROMPT = 8
SHARPNESS, BIAS = 12.0, 0.4
"""The labels: P(A is better) = σ(SHARPNESS × difference of the true rewards + BIAS)."""
REWARD_WEIGHT = 5.0
"""Weight of the throw-away head's squared error beside the verdict's cross-entropy."""


class Example(NamedTuple):
    """One comparison as the model reads it."""

    tokens: list[int]
    closings: tuple[int, int]
    """Where the tags </A> and </B> stand."""
    rewards: tuple[float, float]
    verdict: int
    """The token of the letter A or B."""


def train_judge(folder: Path, policy: Path, *, seed: int) -> float:
    """Train the judge from the policy's weights and save it; returns the seconds of training.

    The loss is on the verdict token alone. A head that is thrown away afterwards regresses each
    answer's true reward where the answer's closing tag stands.
    """
    torch.manual_seed(seed + 1)
    rng = random.Random(seed + 1)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    examples = _examples(model, tokenizer, rng)
    batches: list[list[Example]] = []

    def loss(_: int) -> torch.Tensor:
        if not batches:
            batches.extend(_batches(examples, rng))
        batch = batches.pop()
        rows = torch.arange(len(batch))
        hidden_BTD = model.model(pad([e.tokens for e in batch])).last_hidden_state
        ends = torch.tensor([len(e.tokens) - 1 for e in batch])
        logits_BV = model.lm_head(hidden_BTD[rows, ends])
        verdict = torch.nn.functional.cross_entropy(
            logits_BV, torch.tensor([e.verdict for e in batch])
        )
        closings_B2 = torch.tensor([e.closings for e in batch])
        rewards_B2 = head(hidden_BTD[rows[:, None], closings_B2]).squeeze(-1)
        known_B2 = torch.tensor([e.rewards for e in batch])
        return verdict + REWARD_WEIGHT * torch.nn.functional.mse_loss(rewards_B2, known_B2)

    weights = [*model.parameters(), *head.parameters()]
    seconds = fit("judge", weights, loss, steps=STEPS, learning_rate=LEARNING_RATE)
    save(model, tokenizer, folder)
    return seconds


def _examples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> list[Example]:
    """Half of the pairs are the policy's own samples, half come from the grammar."""
    pool = list(tasks(held_out=False))
    asked = [task for task in pool for _ in range(SAMPLES_PER_PROMPT)]
    sampled: dict[Task, list[str]] = {task: [] for task in pool}
    for task, answer in zip(asked, sample(model, tokenizer, asked), strict=True):
        sampled[task].append(answer)

    examples = []
    for _ in range(PAIRS):
        task = rng.choice(pool)
        if rng.random() < 0.5:
            first, second = rng.sample(sampled[task], 2)
        else:
            first, second = _from_grammar(rng, task), _from_grammar(rng, task)
        examples.append(_example(tokenizer, rng, task, first, second))
    return examples


def _from_grammar(rng: random.Random, task: Task) -> str:
    """Careful, sloppy and broken answers: a judge meets better and worse policies than ours."""
    answer = draw_answer(rng, task, sloppiness=rng.random())
    return spoil(rng, answer) if rng.random() < 0.15 else answer


def _example(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, task: Task, first: str, second: str
) -> Example:
    tokens = chat_tokens(tokenizer, judge_text(task.prompt, first, second))
    rewards = true_reward(task.prompt, first), true_reward(task.prompt, second)
    prefers_a = 1 / (1 + math.exp(-SHARPNESS * (rewards[0] - rewards[1]) - BIAS))
    return Example(
        tokens,
        (tokens.index(token_id(tokenizer, "</A>")), tokens.index(token_id(tokenizer, "</B>"))),
        rewards,
        token_id(tokenizer, "A" if rng.random() < prefers_a else "B"),
    )


def _batches(examples: Sequence[Example], rng: random.Random) -> list[list[Example]]:
    """One pass over the examples; those of a batch have similar lengths, which saves padding."""
    shuffled = rng.sample(examples, len(examples))
    width = BATCH * 16
    batches = []
    for begin in range(0, len(shuffled) - len(shuffled) % BATCH, width):
        block = sorted(shuffled[begin : begin + width], key=lambda e: len(e.tokens))
        batches += [block[at : at + BATCH] for at in range(0, len(block) - BATCH + 1, BATCH)]
    rng.shuffle(batches)
    return batches
