"""The committed policy and judge: they load, are small, and do what the pipeline needs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from judging.judge import Comparison
from judging.rubric import load_rubric
from preferences.records import Candidate, Message, Prompt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MINIATURE = Path(__file__).parents[2] / "recipes" / "miniature"
RUBRIC = load_rubric(str(MINIATURE / "rubric.md"))
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


def question(asked: str, first: str, second: str) -> str:
    """The judge's user message, as the pipeline renders it."""
    a, b = (Candidate(text, "p", "test", text, "complete") for text in (first, second))
    return RUBRIC.render(Comparison(Prompt("p", (Message("user", asked),), "test"), a, b))


def verdict(tokenizer: Any, judge: Any, asked: str, first: str, second: str) -> tuple[float, float]:
    """The probabilities of A and B as the next token."""
    text = chat(tokenizer, ("user", question(asked, first, second)))
    tokens = tokenizer(text, return_tensors="pt").input_ids
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


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_verdict_is_one_token_after_the_rendered_rubric(tokenizer: Any, letter: str) -> None:
    text = chat(tokenizer, ("user", question("How do I sell the vase?", "Hello!", "Welcome!")))
    assert text == (
        "<|im_start|>user\n"
        "<prompt>How do I sell the vase?</prompt>\n<A>Hello!</A>\n<B>Welcome!</B>\n"
        "Which is better, A or B?<|im_end|>"
        "<|im_start|>assistant\n"
    )
    before = tokenizer.encode(text, add_special_tokens=False)
    after = tokenizer.encode(text + letter, add_special_tokens=False)
    assert after == [*before, tokenizer.convert_tokens_to_ids(letter)]


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
