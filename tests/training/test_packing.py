"""Packed samples train exactly what they train alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import InputError
from tests.training.conftest import THINGS, answer, build_tokenizer

Sample = tuple[list[int], list[int]]
"""Prompt and answer."""


def samples(number: int) -> list[Sample]:
    tokenizer, chance = build_tokenizer(), random.Random(5)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [
        (
            ids(f"<bos><user>paint {' '.join(chance.choices(THINGS, k=chance.randint(1, 4)))}<end>")
            + ids("\n<assistant>"),
            ids(answer(chance) + "<end>"),
        )
        for _ in range(number)
    ]


def rows_of(found: Sequence[Sample]) -> Any:
    import datasets

    from training.sft import scored

    return scored(
        datasets.Dataset.from_dict(
            {"prompt_ids": [p for p, _ in found], "answer_ids": [a for _, a in found]}
        )
    )


def loss_and_gradients(policy: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Summed over scored tokens, in float64, by nothing of TRL's."""
    import torch

    labels = batch.pop("labels")
    policy.zero_grad()
    logits = policy(**batch, use_cache=False).logits[:, :-1]
    scored = labels[:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(logits[scored], labels[:, 1:][scored], reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {n: p.grad.clone() for n, p in policy.named_parameters()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_samples_have_the_loss_and_the_gradients_they_have_alone(
    attention: str, model: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from training.packing import collator, packed

    policy = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).double()
    found = samples(23)
    rows = packed(rows_of(found), 40)
    assert len(rows) < 12  # several samples a row, and rows of unequal length
    assert len({len(row["input_ids"]) for row in rows}) > 1
    ours = loss_and_gradients(policy, collator(attention, 0)(list(rows)))
    # One by one, without padding or positions.
    total = 0.0
    gradients: dict[str, Any] = {}
    for prompt, said in found:
        alone = {
            "input_ids": torch.tensor([prompt + said]),
            "labels": torch.tensor([[-100] * len(prompt) + said]),
        }
        loss, found_gradients = loss_and_gradients(policy, alone)
        total += loss
        for name, gradient in found_gradients.items():
            gradients[name] = gradients.get(name, 0) + gradient
    assert ours[0] == pytest.approx(total, rel=1e-6)
    for name, gradient in gradients.items():
        assert (ours[1][name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_every_sample_is_in_one_row_whole() -> None:
    from training.packing import packed

    found = samples(50)
    rows = packed(rows_of(found), 30)
    unpacked = []
    for row in rows:
        assert len(row["input_ids"]) == sum(row["seq_lengths"]) <= 30
        start = 0
        for length in row["seq_lengths"]:
            unpacked.append(row["input_ids"][start : start + length])
            start += length
    assert sorted(unpacked) == sorted(prompt + said for prompt, said in found)
    with pytest.raises(ValueError, match="does not fit a row of 6"):
        packed(rows_of(found), 6)


def test_only_tokens_of_answers_are_scored_in_a_packed_row() -> None:
    from training.packing import collator, packed

    found = samples(9)
    batch = collator("sdpa", 0)(list(packed(rows_of(found), 40)))
    scored = batch["labels"][batch["labels"] != -100].tolist()
    assert sorted(scored) == sorted(token for _, said in found for token in said)


def test_a_samples_first_token_is_foretold_by_nothing() -> None:
    from training.packing import collator

    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}
    for attention in ("sdpa", "flash_attention_2"):
        assert collator(attention, 0)([row])["labels"].tolist() == [[-100, 6, -100, 8]]


def test_rows_for_flash_attention_are_one_row_that_says_where_samples_begin() -> None:
    from training.packing import collator

    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [2, 1]},
        {"input_ids": [8, 9], "labels": [8, 9], "seq_lengths": [2]},
    ]
    batch = collator("flash_attention_2", 0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 3, 5]
    assert "attention_mask" not in batch


def test_a_model_that_mixes_packed_samples_is_refused(model: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

    from training.packing import collator, require_separate

    collate = collator("sdpa", 0)
    llama = AutoModelForCausalLM.from_pretrained(model)
    require_separate(llama, collate)

    def one_after_another(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    with pytest.raises(InputError, match="not kept apart by this model with sdpa attention"):
        require_separate(llama, one_after_another)
    # A state goes from token to token, whatever the positions say.
    torch.manual_seed(0)
    shape = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    with pytest.raises(InputError, match="say packing: false"):
        require_separate(MambaForCausalLM(shape), collate)  # type: ignore[no-untyped-call]


def test_virtual_tokens_and_packing_do_not_go_together() -> None:
    from training.sft import SFTConfig

    with pytest.raises(ValueError, match=r"virtual tokens of prompt_tuning .* packing: false"):
        SFTConfig(model="m", weights="prompt_tuning", packing=True)


def test_unpacked_rows_beside_packed_ones_are_padded_as_ever(tmp_path: Path) -> None:
    from training.packing import collator

    batch = collator("sdpa", 0)(
        [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[-100, 6], [7, -100]]
