"""The policy: a Llama of a million parameters, trained on answers of mixed quality."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from answers import draw_answer
from fitting import fit
from safetensors.torch import save_file
from tokenizer import END_ID, PAD_ID, build_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from world import Task, tasks

EXAMPLES, BATCH, STEPS, LEARNING_RATE = 20_000, 64, 600, 2e-3
MAX_LENGTH = 512
"""Most tokens of a conversation; the longest judge prompt has about 140."""
MAX_ANSWER = 64
"""Most tokens of a sampled answer; the longest well-formed one has about 55."""


def train_policy(folder: Path, *, seed: int) -> float:
    """Train the policy and save it to the folder; returns the seconds the training took.

    The loss is on the answer's tokens and the end token only.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer(MAX_LENGTH)
    model = new_model(tokenizer)
    pool = list(tasks(held_out=False))
    examples = [_example(tokenizer, rng, rng.choice(pool)) for _ in range(EXAMPLES)]
    order: list[int] = []

    def loss(_: int) -> torch.Tensor:
        if len(order) < BATCH:
            order[:] = rng.sample(range(EXAMPLES), EXAMPLES)
        batch = [examples[order.pop()] for _ in range(BATCH)]
        tokens_BT = pad([tokens for tokens, _ in batch])
        answer_BT = pad([[0] * start + [1] * (len(t) - start) for t, start in batch]) > 0
        # Padding stands right of everything that is read, so causal attention needs no mask.
        hidden_BTD = model.model(tokens_BT).last_hidden_state
        logits_NV = model.lm_head(hidden_BTD[:, :-1][answer_BT[:, 1:]])
        return torch.nn.functional.cross_entropy(logits_NV, tokens_BT[:, 1:][answer_BT[:, 1:]])

    seconds = fit("policy", model.parameters(), loss, steps=STEPS, learning_rate=LEARNING_RATE)
    save(model, tokenizer, folder)
    return seconds


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model for this tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the folder: weights in float16 to be small, to be computed with in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=True, top_k=0
    ).save_pretrained(folder)
    for name in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)


def pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of tokens as one tensor, padded on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=PAD_ID)


def chat_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of one user message and the beginning of the assistant's turn."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer.encode(chat, add_special_tokens=False))


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Task]
) -> list[str]:
    """One answer at temperature 1 to each task."""
    answers: list[str] = []
    for begin in range(0, len(prompts), 512):
        rows = [chat_tokens(tokenizer, task.prompt) for task in prompts[begin : begin + 512]]
        longest = max(map(len, rows))
        padding = [[PAD_ID] * (longest - len(row)) for row in rows]
        tokens = torch.tensor([p + row for p, row in zip(padding, rows, strict=True)])
        mask = torch.tensor([[0] * len(p) + [1] * (longest - len(p)) for p in padding])
        output = model.generate(  # type: ignore[misc]
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=MAX_ANSWER,
            do_sample=True,
            top_k=0,
        )
        answers += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return answers


def _example(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, task: Task
) -> tuple[list[int], int]:
    """The tokens of a conversation, and where its answer starts."""
    question = chat_tokens(tokenizer, task.prompt)
    answer = tokenizer.encode(draw_answer(rng, task) + tokenizer.eos_token)
    return [*question, *answer], len(question)
