"""KTO from likes and dislikes: what they are made of, the paper's loss, and what it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preferences.errors import InputError
from tests.training.conftest import (
    EVERY_FOUR,
    QUICK,
    THINGS,
    assert_an_interruption_changes_nothing,
    silent,
)
from tests.training.test_sft import write_rows
from training.answers import liked_and_disliked
from training.evaluation import implicit_reward_accuracy
from training.kto import KTOConfig, build_trainer, label_weights, load_data, with_other_answers
from training.loop import train
from training.models import load_tokenizer
from training.probe import ProbeConfig
from training.run import TrainingRuntime

MakeKTO = Callable[..., KTOConfig]


@pytest.fixture
def make_kto(model: str) -> MakeKTO:
    """A configuration for the tiny model; keyword arguments change fields."""
    settings: dict[str, Any] = {
        "model": model,
        **QUICK,
        "beta": 0.3,
        "batch_size": 8,
        "probe": None,
    }
    return lambda **changes: KTOConfig(**{**settings, **changes})


def test_chosen_answers_are_liked_and_rejected_ones_disliked_each_once(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "prompt_id": prompt,
            "chosen_id": f"{prompt}/{chosen}",
            "rejected_id": f"{prompt}/{rejected}",
        }

    rows = [pair("p", "a", "b"), pair("q", "a", "b"), pair("p", "b", "c"), pair("p", "a", "c")]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train-00000.parquet")
    found = liked_and_disliked(tmp_path, "train")
    assert found is not None
    answers, dropped = found
    assert [(a.prompt_id, a.answer[0].content, a.liked) for a in answers] == [
        ("p", "a", True),
        ("p", "c", False),
        ("q", "a", True),
        ("q", "b", False),
    ]
    # p/b lost to a and won against c.
    assert [(d.record_id, d.prompt_id, d.reason) for d in dropped] == [
        ("p/b", "p", "liked_and_disliked")
    ]
    assert liked_and_disliked(tmp_path, "test") is None


def test_likes_may_come_as_a_table_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"prompt": "paint thing1", "response": "red", "label": True},
        {"prompt": "paint thing2", "response": "blue", "label": False},
    ]
    found = liked_and_disliked(write_rows(tmp_path / "likes", "train", rows), "train")
    assert found is not None
    assert [(a.answer[0].content, a.liked) for a in found[0]] == [("red", True), ("blue", False)]
    bare = [{"prompt": "paint thing1", "response": "red"}]
    with pytest.raises(
        InputError, match=r"no likes in the train split .*prompt, completion, label"
    ):
        liked_and_disliked(write_rows(tmp_path / "bare", "train", bare), "train")
    odd = [{"prompt": "paint thing1", "response": "red", "label": 3}]
    with pytest.raises(InputError, match="train row 1: the label is 3"):
        liked_and_disliked(write_rows(tmp_path / "odd", "train", odd), "train")


@pytest.mark.parametrize("liked", [True, False])
def test_likes_alone_or_dislikes_alone_are_refused(
    liked: bool, make_kto: MakeKTO, tmp_path: Path
) -> None:
    config = make_kto()
    rows = [{"prompt": f"paint thing{n}", "completion": "red", "label": liked} for n in range(4)]
    dataset = write_rows(tmp_path, "train", rows)
    with pytest.raises(InputError, match=r"(4 likes and 0|0 likes and 4) dislikes.*needs both"):
        load_data(config, dataset, load_tokenizer(config.model, None))


def rows_of(prompts: list[str], length: int = 3) -> Any:
    import datasets

    return datasets.Dataset.from_dict(
        {
            "prompt_ids": [[1, 2]] * len(prompts),
            "answer_ids": [[10 + n] * length for n in range(len(prompts))],
            "label": [n % 2 == 0 for n in range(len(prompts))],
            "prompt_id": prompts,
        }
    )


@given(st.lists(st.integers(1, 3), min_size=3, max_size=12), st.randoms(use_true_random=False))
def test_every_answer_is_put_once_to_another_prompt_than_its_own(
    counts: list[int], chance: Any
) -> None:
    prompts = [f"p{n}" for n, count in enumerate(counts) for _ in range(count)]
    if 2 * max(counts) > len(prompts):
        return
    chance.shuffle(prompts)
    rows = with_other_answers(rows_of(prompts), 16, "here")
    others = [other[0] - 10 for other in rows["other_ids"]]
    assert sorted(others) == list(range(len(prompts)))
    assert all(prompts[other] != prompt for other, prompt in zip(others, prompts, strict=True))


def test_a_prompt_with_most_of_the_answers_is_refused() -> None:
    with pytest.raises(InputError, match=r"here: 3 of 5 answers are to prompt p.*add prompts"):
        with_other_answers(rows_of(["p", "q", "p", "r", "p"]), 16, "here")


def test_an_answer_that_does_not_fit_its_new_prompt_is_cut() -> None:
    rows = with_other_answers(rows_of(["p", "q"], length=9), 8, "here")
    assert [len(other) for other in rows["other_ids"]] == [6, 6]  # 8 less the prompt's 2


def test_likes_and_dislikes_weigh_alike_unless_told_otherwise() -> None:
    config = KTOConfig(model="m")
    # 3·λ_D = 1·λ_U and (3·λ_D + 1·λ_U)/4 = 1: λ_D = 2/3 and λ_U = 2.
    assert label_weights(config, [True, True, True, False]) == pytest.approx((2 / 3, 2))
    assert label_weights(config, [True, False]) == (1, 1)
    told = KTOConfig(model="m", undesirable_weight=1.5)
    assert label_weights(told, [True, True, True, False]) == (1, 1.5)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        KTOConfig(model="m", batch_size=1)


def trainer_for(config: KTOConfig, dataset: Path, output: Path) -> Any:
    answers, _ = load_data(config, dataset, load_tokenizer(config.model, None))
    assert answers is not None
    return build_trainer(config, TrainingRuntime(), output, answers, None)


def trained_loss(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """Through TRL's collator and TRL's loss."""
    trainer.model.eval()
    return float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)).detach())


LIKES = [
    ("paint thing1", "red red", True),
    ("paint thing1", "blue", False),
    ("paint thing2 thing3", "red", True),
    ("paint thing4", "white red blue green", True),
    ("paint thing5", "black black", True),
]


def likes(folder: Path) -> Path:
    rows = [{"prompt": p, "completion": a, "label": label} for p, a, label in LIKES]
    return write_rows(folder, "train", rows)


@pytest.mark.parametrize("weights", ["lora", "qlora", "full"])
def test_before_any_step_the_loss_is_one_half(
    weights: str, make_kto: MakeKTO, tmp_path: Path
) -> None:
    trainer = trainer_for(make_kto(weights=weights), likes(tmp_path / "d"), tmp_path / "run")
    # r = z = 0 and 1 - σ(0) = 1/2, times weights whose mean is 1: 4 × 5/8 and 1 × 5/2 over 5.
    rows = [trainer.train_dataset[n] for n in range(5)]
    assert trained_loss(trainer, rows) == pytest.approx(0.5, abs=1e-6)
    assert trained_loss(trainer, rows[:1]) == pytest.approx(5 / 8 / 2, abs=1e-6)
    assert trained_loss(trainer, rows[1:2]) == pytest.approx(5 / 2 / 2, abs=1e-6)


def summed_log_prob(model: Any, ids: list[int], answered: list[int]) -> float:
    """log π(answer | prompt), token by token, with nothing of ours or of TRL's."""
    import torch

    total = 0.0
    for i, token in enumerate(answered):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answered[:i]])).logits[0, -1].double()
        total += float(logits[token] - torch.logsumexp(logits, 0))
    return total


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("towards", ["others", "away"])
def test_the_loss_is_equation_8_of_the_paper(
    towards: str, weights: str, make_kto: MakeKTO, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = make_kto(weights=weights)
    trainer = trainer_for(config, likes(tmp_path / "d"), tmp_path / "run")
    reference: Any = AutoModelForCausalLM.from_pretrained(config.model)
    reference.eval()
    trainer.model.eval()
    torch.manual_seed(3 if towards == "others" else 5)
    for name, parameter in trainer.model.named_parameters():
        if weights == "full":
            parameter.data += 0.05 * torch.randn_like(parameter)
        elif "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tokenizer = trainer.processing_class

    def gain(prompt: str, answer: str) -> float:
        text = f"<bos><user>{prompt}<end>\n<assistant>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answered = tokenizer(f"{answer}<end>", add_special_tokens=False)["input_ids"]
        policy = summed_log_prob(trainer.model, ids, answered)
        return policy - summed_log_prob(reference, ids, answered)

    rows = [trainer.train_dataset[n] for n in range(5)]
    # What each prompt is shown besides: one of the other answers, by the words it has.
    shown = [tokenizer.decode(row["KL_completion_ids"][:-1]) for row in rows]
    assert sorted(shown) == sorted(answer for _, answer, _ in LIKES)
    z = sum(gain(prompt, other) for (prompt, _, _), other in zip(LIKES, shown, strict=True)) / 5
    z = max(0.0, z)
    losses = []
    for prompt, answer, liked in LIKES:
        distance = config.beta * (gain(prompt, answer) - z) * (1 if liked else -1)
        losses.append((5 / 8 if liked else 5 / 2) * (1 - 1 / (1 + math.exp(-distance))))
    assert max(losses) - min(losses) > 0.1
    assert trained_loss(trainer, rows) == pytest.approx(sum(losses) / 5, abs=2e-5)


def test_batches_are_drawn_anew_in_every_epoch(make_kto: MakeKTO, tmp_path: Path) -> None:
    import torch

    trainer = trainer_for(make_kto(), likes(tmp_path / "d"), tmp_path / "run")
    torch.manual_seed(0)
    sampler = trainer._get_train_sampler(trainer.train_dataset)
    orders = {tuple(sampler) for _ in range(6)}
    assert len(orders) > 1
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3, 4)}


@pytest.mark.parametrize("dislikes", [1, 4])
def test_likes_of_red_make_the_policy_say_red(
    dislikes: int, make_kto: MakeKTO, red_judge: Any, red_pairs: Path, tmp_path: Path
) -> None:
    # As many dislikes as likes, and four times as many.
    others = ("blue blue", "green", "white black green", "black white")
    rows = [
        {"prompt": f"paint {thing}", "completion": said, "label": said == "red red"}
        for thing in THINGS[:24]
        for said in ("red red", *others[:dislikes])
    ]
    write_rows(tmp_path, "train", rows)
    held_out = (red_pairs / "data" / "test-00000.parquet").read_bytes()
    (tmp_path / "data" / "test-00000.parquet").write_bytes(held_out)
    probe = ProbeConfig(
        every=15, prompts=24, max_tokens=12, max_malformed=0.9, max_length_rate=0.9, min_win_rate=0
    )
    config = make_kto(weights="full", learning_rate=2e-3, max_steps=30, probe=probe)
    run = tmp_path / "run"
    result = train(config, tmp_path, run, EVERY_FOUR, red_judge, progress=silent)
    assert (result.metrics["likes"], result.metrics["dislikes"]) == (24, 24 * dislikes)
    # The one like weighs as much as all dislikes of its prompt, and all together 1 on average.
    liked, disliked = result.metrics["weights/liked"], result.metrics["weights/disliked"]
    assert liked == pytest.approx(dislikes * disliked)
    assert liked + dislikes * disliked == pytest.approx(1 + dislikes)
    last = result.probes[-1]
    assert last.win_rate is not None
    assert last.win_rate > 0.65
    assert result.evaluation["eval_rewards/margins"] > 0.5
    assert implicit_reward_accuracy(config, run, tmp_path).accuracy.mean > 0.9


@pytest.mark.parametrize("weights", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    weights: str, make_kto: MakeKTO, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_kto(
        weights=weights, batch_size=2, accumulation=2, lora={"rank": 4, "dropout": 0.2}
    )
    assert_an_interruption_changes_nothing(config, red_pairs, tmp_path)
