"""Answers come out as transformers generates them, with each prompt computed once and no row that
has ended."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.architectures import ARCHITECTURES, a_model
from training.decoding import decode

ALMOST_NONE = 1e-6
"""A temperature at which the likeliest token is drawn."""


def draw_prompts() -> list[list[int]]:
    torch.manual_seed(1)
    p, q, r = (torch.randint(3, 97, (n,)).tolist() for n in (9, 2, 14))
    return [p, q, p, r, q, p]


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_every_architecture_answers_as_by_itself(config: str) -> None:
    """The windows of those that have one are shorter than the prompts."""
    model = a_model(config).eval()
    prompts = draw_prompts()

    def alone(prompt: list[int]) -> list[int]:
        given = torch.tensor([prompt])
        found = model.generate(given, max_new_tokens=12, do_sample=False, eos_token_id=[])
        answer: list[int] = found[0, len(prompt) :].tolist()
        return answer

    expected = [alone(prompt) for prompt in prompts]
    ends = {expected[0][4]}  # so the first ends early
    for n, answer in enumerate(expected):
        last = next((i for i, token in enumerate(answer) if token in ends), 11)
        expected[n] = answer[: last + 1]
    assert len({len(answer) for answer in expected}) > 1
    with torch.no_grad():
        found = decode(model, prompts, ends=ends, pad=0, temperature=ALMOST_NONE, max_tokens=12)
    assert found == expected


def test_a_prompt_is_computed_once_and_who_has_ended_leaves_the_batch() -> None:
    model = a_model().eval()
    computed: list[tuple[int, ...]] = []

    def look(_: Any, given: Any, values: dict[str, Any]) -> None:
        computed.append(tuple(values["input_ids"].shape))

    model.register_forward_pre_hook(look, with_kwargs=True)
    torch.manual_seed(0)
    everything = set(range(48))  # half of the vocabulary ends an answer
    prompts = draw_prompts()
    with torch.no_grad():
        answers = decode(model, prompts, ends=everything, pad=0, temperature=1.0, max_tokens=20)
    going = [sum(len(answer) > n for answer in answers) for n in range(1, max(map(len, answers)))]
    assert going[0] > going[-1]
    assert computed == [(3, 14), *((rows, 1) for rows in going)]
    assert all(answer[-1] in everything for answer in answers if len(answer) < 20)
    assert not any(token in everything for answer in answers for token in answer[:-1])


def test_two_answers_to_one_prompt_have_noise_of_their_own() -> None:
    model = a_model().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = decode(
            model, [[5, 6, 7]] * 2, ends=(), pad=0, temperature=1.0, max_tokens=8
        )
    assert first != second
