"""Packing answers behind the prompts they share changes nothing but the time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from preferences.records import Message
from tests.training.architectures import ARCHITECTURES, IGNORED, a_model, apart
from training.actors import Actors, read_policy, read_reference
from training.data import HeldOutPrompt
from training.rollouts import Answer, Rollouts, as_rollouts
from training.shared_prefix import Shared
from training.shared_rollouts import Packed, packed, share, words

TEMPERATURE = 0.7
WORDS = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))


def draw(*lengths: int) -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(3, 97, (n,)).tolist() for n in lengths]


def asked_and_answered() -> list[tuple[list[int], list[int]]]:
    """Three answers to one prompt and two to another, one to a third, of all kinds."""
    p, q, r, x, y, z = draw(9, 14, 1, 8, 5, 7)
    return [
        (p, x),
        (q, y),
        (p, [*x[:3], *y]),  # begins as its sibling does
        (r, z),  # a prompt of one token
        (q, y[:2]),  # the beginning of its sibling
        (p, x),  # the same twice
        (p[:5], y),  # a prompt that begins another one
        (q, z[:1]),
    ]


def rollouts_of(rows: list[tuple[list[int], list[int]]]) -> Rollouts:
    prompts = [HeldOutPrompt(str(p), (Message("user", "?"),), tuple(p)) for p, _ in rows]
    answers = [Answer(tuple(answer), finished=True) for _, answer in rows]
    return as_rollouts(prompts, answers, WORDS, 0, "cpu")


def learner(config: str = "LlamaConfig") -> Actors:
    """A policy that still computes as the library does."""
    model = a_model(config)
    value_head = nn.Linear(32, 1)
    return Actors(model, value_head, model)


def sharing(actors: Actors) -> Actors:
    """The same, each token once."""
    reason = share(actors.policy, TEMPERATURE)
    assert reason is None
    return Actors(actors.policy, actors.value_head, actors.frozen, unshared=None)


def read(actors: Actors, rollouts: Rollouts) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probabilities, values and entropies of the answers' tokens, and the gradients of a sum
    of the first two in which each counts differently."""
    rows = torch.arange(len(rollouts)).flip(0)
    mask = rollouts.mask[rows]
    actors.policy.zero_grad()
    actors.value_head.zero_grad()
    readings, values = read_policy(actors, rollouts, rows, TEMPERATURE)
    weights = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(2))
    total = ((readings.log_probs * weights[0] + values * weights[1]) * mask).sum()
    torch.autograd.backward(total)
    gradients = {
        n: p.grad.clone() for n, p in actors.policy.named_parameters() if p.grad is not None
    }
    gradients |= {n: p.grad.clone() for n, p in actors.value_head.named_parameters()}  # type: ignore[union-attr]
    with torch.no_grad():
        still, _ = read_policy(actors, rollouts, rows, TEMPERATURE)
    reference = read_reference(actors, rollouts, rows, TEMPERATURE)
    assert still.entropy is not None
    return [
        each[mask] for each in (readings.log_probs, values, still.entropy, reference)
    ], gradients


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_every_architecture_reads_as_it_does_with_padding_and_has_the_same_gradients(
    config: str,
) -> None:
    actors, rollouts = learner(config), rollouts_of(asked_and_answered())
    expected, gradients = read(actors, rollouts)
    found, ours = read(sharing(actors), rollouts)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-5
    assert apart(ours, gradients) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_head_that_trains_has_the_same_gradient(checkpointing: bool) -> None:
    actors, rollouts = learner("Gemma2Config"), rollouts_of(asked_and_answered())
    actors.policy.requires_grad_(True)  # its head is its embedding
    expected, gradients = read(actors, rollouts)
    if checkpointing:
        actors.policy.gradient_checkpointing_enable()
    found, ours = read(sharing(actors), rollouts)
    assert "model.embed_tokens.weight" in ours
    assert (found[0] - expected[0]).abs().max() < 1e-5
    assert apart(ours, gradients) < 1e-6


def both_padded() -> dict[str, Tensor]:
    """As TRL pads what was sampled: prompts at their left, answers at their right."""
    rows = asked_and_answered()
    before, after = (max(len(row[n]) for row in rows) for n in (0, 1))
    ids, present, labels = [], [], []
    for prompt, answer in rows:
        left, right = before - len(prompt), after - len(answer)
        ids.append([0] * left + prompt + answer + [0] * right)
        present.append([0] * left + [1] * (len(prompt) + len(answer)) + [0] * right)
        labels.append([IGNORED] * before + answer + [IGNORED] * right)
    tensors = map(torch.tensor, (ids, present, labels))
    return dict(zip(("input_ids", "attention_mask", "labels"), tensors, strict=True))


def test_called_as_trl_calls_it_a_model_returns_what_it_does_with_trls_head() -> None:
    model = a_model("Gemma2Config")
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    batch = both_padded()

    def scored() -> tuple[Any, dict[str, Tensor]]:
        model.zero_grad()
        found = model(**batch, fused_lm_head=True)
        weights = torch.randn(found.log_probs.shape, generator=torch.Generator().manual_seed(2))
        (found.log_probs * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return found, gradients

    expected, gradients = scored()
    assert share(model, TEMPERATURE) is None
    found, ours = scored()
    assert torch.equal(found.label_mask, expected.label_mask)
    assert (found.log_probs - expected.log_probs).abs().max() < 1e-5
    assert (found.entropy - expected.entropy).abs().max() < 1e-5
    assert apart(ours, gradients) < 1e-6


def test_no_token_of_a_shared_prompt_stands_twice() -> None:
    rows = [([5, 6, 7], [1, 2]), ([5, 6, 7], [1, 3, 4]), ([8], [1]), ([5, 6, 7], [9])]
    rollouts = rollouts_of(rows)
    scored = torch.zeros_like(rollouts.present)
    scored[:, rollouts.start :] = rollouts.mask
    batch = packed(rollouts.tokens, rollouts.present, scored)
    # The first group as a whole, of its second answer all but what begins like the first.
    assert batch.row.input_ids.tolist() == [[5, 6, 7, 1, 2, 3, 4, 9, 8, 1]]
    assert batch.row.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5, 3, 0, 1]]
    assert batch.targets.tolist() == [1, 2, 1, 3, 4, 1, 9]
    assert batch.before.tolist() == [2, 3, 2, 3, 5, 8, 2]
    assert batch.ends.tolist() == [4, 6, 9, 7]


def other_prompts_answer_seen(batch: Packed) -> Packed:
    """Each answer but its group's first sees a token of that one."""
    old = batch.row.segments
    seen = tuple(n + (n > 0) for n in old.shared)
    return replaced(batch, segments=type(old)(old.own, seen, old.answers, {}))


def positions_not_reset(batch: Packed) -> Packed:
    return replaced(batch, position_ids=torch.arange(batch.row.input_ids.shape[1])[None])


def replaced(batch: Packed, **changes: Any) -> Packed:
    from dataclasses import replace

    row: Shared = replace(batch.row, **changes)
    return replace(batch, row=row)


@pytest.mark.parametrize("fault", [other_prompts_answer_seen, positions_not_reset])
def test_a_planted_fault_is_seen(
    fault: Callable[[Packed], Packed], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import actors as module

    actors, rollouts = learner(), rollouts_of(asked_and_answered())
    expected, gradients = read(actors, rollouts)
    monkeypatch.setattr(module, "packed", lambda *given: fault(packed(*given)))
    found, ours = read(sharing(actors), rollouts)
    assert (found[0] - expected[0]).abs().max() > 1e-3
    assert apart(ours, gradients) > 1e-3


def test_where_packing_would_not_be_exact_the_model_stays_as_it_was_and_people_are_told() -> None:
    model = a_model(attention_dropout=0.1)
    before = model.forward
    reason = share(model, TEMPERATURE)
    assert reason == "dropout draws anew for every row"
    assert model.forward == before
    assert words(reason).endswith("repeated prompts: dropout draws anew for every row")
    assert words(None).startswith("shared: each prompt once")
    with pytest.raises(TypeError, match="know nothing of pixel_values"):
        share(other := a_model(), TEMPERATURE)
        other(**both_padded(), fused_lm_head=True, pixel_values=torch.zeros(1))
