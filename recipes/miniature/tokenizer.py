"""The byte-level BPE tokenizer in which every word of the world is one token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from answers import draw_answer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from world import tasks

PAD, END, START = "<|pad|>", "<|im_end|>", "<|im_start|>"
PAD_ID, END_ID = 0, 1
DELIMITERS = ("<prompt>", "</prompt>", "<A>", "</A>", "<B>", "</B>")
"""The judge prompt's tags, one token each."""

RUBRIC = Path(__file__).with_name("rubric.md").read_text(encoding="utf-8")

# No newline after the end token: it would be trained as part of every completion.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer, with the chat template; its vocabulary is as large as the words need."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        special_tokens=[PAD, END, START],  # takes the ids 0, 1, 2
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(_corpus(), trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in DELIMITERS])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [START]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a text that is one token; raises ValueError if it is not."""
    [only] = tokenizer.encode(text, add_special_tokens=False)
    return int(only)


def judge_text(prompt: str, first: str, second: str) -> str:
    """The judge's user message: the rubric with its three placeholders filled."""
    head, tail = RUBRIC.split("{{prompt}}")
    middle, tail = tail.split("{{first}}")
    between, end = tail.split("{{second}}")
    return f"{head}{prompt}{middle}{first}{between}{second}{end}"


def _corpus() -> Iterator[str]:
    """Every phrase of the world often enough that training merges each word whole."""
    rng = random.Random(0)
    for task in tasks(held_out=False):
        yield task.prompt
        for _ in range(8):
            yield draw_answer(rng, task)
    # One letter each, "A" and "B" are tokens of the alphabet already.
    yield judge_text("", "", "")
    yield from ("system\n", "user\n", "assistant\n")
