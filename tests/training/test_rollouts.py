"""Which prompts a step answers, what is sampled for them, and the tensors that are made of it."""

from __future__ import annotations

from typing import Any

import pytest

from preferences.records import Message
from training.data import HeldOutPrompt, held_out_prompt
from training.rollouts import (
    Answer,
    answer_from,
    as_rollouts,
    prompts_of_step,
    sample_answers,
    seed_of_step,
)

END = 3


def test_rollouts_are_prompts_answers_and_padding() -> None:
    prompts = [
        HeldOutPrompt("a", (Message("user", "a"),), (1, 2)),
        HeldOutPrompt("b", (Message("user", "b"),), (1, 2, 4, 5)),
    ]

    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return "-".join(map(str, ids))

    answers = [Answer((7, 8, 9, END), True), Answer((7,), False)]
    rollouts = as_rollouts(prompts, answers, Words(), 0, "cpu")
    assert rollouts.tokens.tolist() == [[1, 2, 7, 8, 9, END], [1, 2, 4, 5, 7, 0]]
    assert rollouts.present.tolist() == [[True] * 6, [True] * 5 + [False]]
    assert rollouts.start == 2
    # From the end of the shortest prompt on: what was answered, end token and all.
    assert rollouts.mask.tolist() == [[True] * 4, [False, False, True, False]]
    assert rollouts.finished.tolist() == [True, False]
    assert rollouts.texts == ("7-8-9-3", "7")


def test_an_answer_goes_up_to_its_first_end_token() -> None:
    assert answer_from([7, 8, END, 0, 0], {END}) == Answer((7, 8, END), True)
    assert answer_from([END, 8, END], {END, 5}) == Answer((END,), True)
    assert answer_from([7, 5, END], {END, 5}) == Answer((7, 5), True)
    assert answer_from([7, 8], {END}) == Answer((7, 8), False)


def test_every_prompt_is_answered_once_in_a_pass_and_each_pass_has_its_order() -> None:
    steps = [prompts_of_step(10, 4, seed=0, step=step) for step in range(1, 6)]
    asked = [place for step in steps for place in step]
    assert sorted(asked[:10]) == sorted(asked[10:]) == list(range(10))
    assert asked[:10] != asked[10:]
    assert prompts_of_step(10, 4, seed=1, step=1) != steps[0]
    assert len({seed_of_step(0, step) for step in range(50)}) == 50


@pytest.mark.parametrize("shared", [False, True], ids=["generated", "decoded"])
def test_answers_come_from_the_whole_distribution_at_the_temperature(
    shared: bool, model: str
) -> None:
    import torch

    from training.models import load_model, load_tokenizer
    from training.shared_rollouts import share

    policy, tokenizer = load_model(model, None, "lora", "float32"), load_tokenizer(model, None)
    asked = held_out_prompt("thing1", [{"role": "user", "content": "paint thing1"}], tokenizer).ids
    number, temperature = 2000, 0.2
    if shared:
        assert share(policy, temperature) is None
    answers = sample_answers(
        policy,
        [asked] * number,
        ends={END},
        pad=0,
        temperature=temperature,
        max_tokens=1,
        seed=1,
        batch_size=number,
        bf16=False,
    )
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([asked])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([a.ids[0] for a in answers]), minlength=len(expected))
    likely = expected > 0.02
    assert 3 <= int(likely.sum()) <= 5
    # χ² over the likely tokens: its 99.9 % point for 5 degrees of freedom is 20.5, for 3 less.
    surprise = (counts - number * expected) ** 2 / (number * expected)
    assert float(surprise[likely].sum()) < 20.5
    # The same draws do not fit another temperature.
    other = logits.softmax(-1)
    assert float(((counts - number * other) ** 2 / (number * other))[likely].sum()) > 40
