"""The committed policy and judge: they load, are small, and do what the pipeline needs of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MINIATURE = Path(__file__).parents[2] / "recipes" / "miniature"
RUBRIC = (MINIATURE / "rubric.md").read_text("utf-8")
MODELS = ("policy", "judge")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MINIATURE / "judge")


@pytest.fixture(scope="module")
def judge() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MINIATURE / "judge").eval()


def chat(tokenizer: Any, *messages: tuple[str, str], asked: bool = True) -> str:
    """The conversation as the model reads it."""
    turns = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asked)
    assert isinstance(text, str)
    return text


def verdict(tokenizer: Any, judge: Any, asked: str, first: str, second: str) -> tuple[float, float]:
    """The probabilities of A and B as the next token."""
    texts = {"prompt": asked, "first": first, "second": second}
    message = re.sub(r"\{\{(\w+)\}\}", lambda match: texts[match[1]], RUBRIC)
    tokens = tokenizer(chat(tokenizer, ("user", message)), return_tensors="pt").input_ids
    letters = tokenizer.convert_tokens_to_ids(["A", "B"])
    with torch.inference_mode():
        a, b = judge(tokens).logits[0, -1].softmax(-1)[letters].tolist()
    return a, b


def test_both_models_together_are_at_most_six_megabytes() -> None:
    sizes = [path.stat().st_size for model in MODELS for path in (MINIATURE / model).iterdir()]
    assert sum(sizes) <= 6e6


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loads_and_computes_in_float32(name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MINIATURE / name)
    assert model.dtype == torch.float32
    assert 0.9e6 < model.num_parameters() < 1.1e6
    assert json.loads((MINIATURE / name / "config.json").read_text("utf-8"))["dtype"] == "float32"


@pytest.mark.parametrize("name", MODELS)
def test_padding_is_not_the_end_token(name: str) -> None:
    config = transformers.AutoConfig.from_pretrained(MINIATURE / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINIATURE / name)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (config.pad_token_id, config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )


def test_words_tags_and_verdict_letters_are_one_token_each(tokenizer: Any) -> None:
    tags = ("<prompt>", "</prompt>", "<A>", "</A>", "<B>", "</B>")
    for text in (*tags, "A", "B", "First", "Hello", " photograph", " umbrella", "<|im_start|>"):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1, text


def test_the_completion_after_the_generation_prompt_ends_with_the_end_token(tokenizer: Any) -> None:
    turns = (("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "How?"))
    before = chat(tokenizer, *turns)
    whole = chat(tokenizer, *turns, ("assistant", "A"), asked=False)
    assert before.endswith("<|im_start|>assistant\n")
    assert whole == before + "A<|im_end|>"


GOOD = (
    "Hello! First empty the lamp. Then rinse the lamp. Next scrub the lamp. "
    "Finally dry the lamp. Good luck!"
)


@pytest.mark.parametrize(
    "worse",
    [
        "You are so lazy. First polish the vase. Then carry the vase. Finally post the vase.",
        "I like to talk. First dry the vase. Next price the vase. Finally lift the vase.",
        "What a silly idea. First lift the lamp. Finally price the lamp. It is a sunny day.",
        "Anyone knows that. First mend the chair. Then open the chair. Finally close the chair.",
        "First the lamp lamp lamp the the Then",
    ],
)
def test_the_judge_prefers_a_clearly_better_answer_in_both_orders(
    tokenizer: Any, judge: Any, worse: str
) -> None:
    asked = "How do I clean the lamp?"
    a, b = verdict(tokenizer, judge, asked, GOOD, worse)
    assert a > b
    assert a + b > 0.99
    a, b = verdict(tokenizer, judge, asked, worse, GOOD)
    assert b > a
    assert a + b > 0.99
