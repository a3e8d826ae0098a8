"""Make a small untrained language model for a table of texts, to try a training recipe on.

    python recipes/small_policy.py shared/alpaca_eval/responses.parquet small-policy

It has 2 million random weights and a tokenizer learnt from the texts: enough to see that training
works and what it learns, on two cores and without a network. It knows no language.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from preferences.tables import read_rows

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ '\\n' }}{{ m['content'] }}<|end|>{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def texts(table: str, limit: int = 4000) -> Iterator[str]:
    """The text columns of the first rows of a table."""
    for number, (_, row) in enumerate(read_rows(table)):
        if number == limit:
            return
        yield from (value for value in row.values() if isinstance(value, str))


def make(table: str, output: Path, seed: int = 0) -> None:
    """Learn a tokenizer of 4,096 pieces from the table and write it with a random Llama."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(table), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(output)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a small untrained model for a table.")
    parser.add_argument("table", help="a .parquet, .jsonl, .json or .csv file with texts")
    parser.add_argument("output", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    make(arguments.table, arguments.output)
    print(f"Wrote {arguments.output}")
