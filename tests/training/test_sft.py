"""Fine-tuning on the best answers: on which answers, on which of their tokens, and what it does."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import InputError
from tests.training.conftest import (
    EVERY_FOUR,
    QUICK,
    assert_an_interruption_changes_nothing,
    saved_weights,
    silent,
    write_split,
)
from training.answers import best_answers, tokenize
from training.loop import train
from training.models import end_tokens, load_tokenizer
from training.probe import ProbeConfig
from training.run import TrainingRuntime
from training.sft import SFTConfig, build_trainer, load_data

MakeSFT = Callable[..., SFTConfig]

SETTINGS: dict[str, Any] = {
    **QUICK,
    "probe": ProbeConfig(
        every=8, prompts=24, max_tokens=12, max_malformed=0.9, max_length_rate=0.9, min_win_rate=0
    ),
}


@pytest.fixture
def make_sft(model: str) -> MakeSFT:
    """A configuration for the tiny model; keyword arguments change fields."""
    return lambda **changes: SFTConfig(**{**SETTINGS, "model": model, **changes})


def write_rows(folder: Path, split: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "data" / f"{split}-00000.parquet")
    return folder


def pair(prompt: str, chosen: str, rejected: str, margin: float) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "prompt_id": prompt,
        "chosen_id": chosen,
        "rejected_id": rejected,
        "margin": margin,
    }


def said(dataset: Path) -> list[tuple[str, str]]:
    found = best_answers(dataset, "train")
    assert found is not None
    return [(answer.prompt_id, answer.answer[-1].content) for answer in found[0]]


def test_of_preferences_each_prompts_best_answer_is_learnt_once(tmp_path: Path) -> None:
    rows = [
        pair("a", "good", "middling", 1.0),
        pair("b", "only", "worse", 0.3),
        pair("a", "best", "good", 0.5),
        # Larger a margin than any of the best's, but it lost to one that is better.
        pair("a", "good", "bad", 2.0),
        # Never rejected either, and by less above the same answer.
        pair("a", "unsure", "middling", 0.9),
        pair("a", "best", "middling", 1.5),
    ]
    assert said(write_rows(tmp_path, "train", rows)) == [("a", "best"), ("b", "only")]
    assert best_answers(tmp_path, "test") is None


def test_of_ranked_answers_the_one_with_the_highest_score_is_learnt(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "q"}]
    rows = [
        {"prompt": asked, "completions": ["x", "y", "z"], "scores": [0.1, 2.0, 1.9], "prompt_id": p}
        for p in ("a", "b")
    ]
    assert said(write_rows(tmp_path, "train", rows)) == [("a", "y"), ("b", "y")]


def test_of_single_answers_all_are_learnt_that_nobody_disliked(tmp_path: Path) -> None:
    rows = [
        {"prompt": "paint thing1", "response": "red", "label": True},
        {"prompt": "paint thing1", "response": "blue", "label": True},
        {"prompt": "paint thing2", "response": "white", "label": False},
    ]
    dataset = write_rows(tmp_path, "train", rows)
    assert [text for _, text in said(dataset)] == ["red", "blue"]
    found = best_answers(dataset, "train")
    assert found is not None
    assert [drop.reason for drop in found[1]] == ["disliked"]
    assert found[0][0].prompt_id == found[0][1].prompt_id != found[1][0].prompt_id


def test_a_table_of_something_else_is_refused_with_what_it_should_have(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, "train", [{"question": "q", "text": "t"}])
    with pytest.raises(InputError, match=r"columns are question, text; a dataset .*one answer a"):
        best_answers(dataset, "train")


def test_answers_that_do_not_fit_are_counted_and_none_left_is_an_error(
    make_sft: MakeSFT, tmp_path: Path
) -> None:
    config = make_sft(max_length=10)
    rows = [
        # <bos> <user> paint thing1 <end> newline <assistant> are 7, and <end> is one more.
        {"prompt": "paint thing1", "completion": "red red"},
        {"prompt": "paint thing1", "completion": "red red red"},
        {"prompt": "paint " * 8, "completion": "red"},
    ]
    train_split, _ = load_data(
        config, write_rows(tmp_path, "train", rows), load_tokenizer(config.model, None)
    )
    assert train_split is not None
    assert (train_split.counts.rows, train_split.counts.kept) == (3, 1)
    assert train_split.counts.dropped == {"answer_too_long": 1, "prompt_too_long": 1}
    with pytest.raises(InputError, match=r"none of its 1 answers .*answer_too_long 1.*max_length"):
        load_data(
            config,
            write_rows(tmp_path, "train", rows[1:2]),
            load_tokenizer(config.model, None),
        )


def test_in_a_conversation_only_the_last_answer_counts(make_sft: MakeSFT, tmp_path: Path) -> None:
    config = make_sft()
    asked = [
        {"role": "user", "content": "paint thing1"},
        {"role": "assistant", "content": "blue blue"},
        {"role": "user", "content": "paint thing2"},
    ]
    said_last = [{"role": "assistant", "content": "red red"}]
    rows = [{"prompt": asked, "completion": said_last}]
    trainer = trainer_for(config, write_rows(tmp_path, "train", rows), tmp_path / "run")
    row, tokenizer = trainer.train_dataset[0], trainer.processing_class
    scored = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(scored) == "red red <end>"
    assert tokenizer.decode(row["input_ids"]).split().count("blue") == 2
    # They are the last tokens, each label in the place of its own token.
    assert row["labels"][-3:] == row["input_ids"][-3:]
    assert set(row["labels"][:-3]) == {-100}


def trainer_for(config: SFTConfig, dataset: Path, output: Path) -> Any:
    found, _ = load_data(config, dataset, load_tokenizer(config.model, None))
    assert found is not None
    return build_trainer(config, TrainingRuntime(), output, found, None)


def answer_loss(model: Any, prompt: str, answer: str, tokenizer: Any) -> tuple[float, int]:
    """-log π(answer + <end> | prompt) and its tokens, one by one, with nothing of ours or TRL's."""
    import torch

    ids = tokenizer(f"<bos><user>{prompt}<end>\n<assistant>", add_special_tokens=False)["input_ids"]
    answered = tokenizer(f"{answer}<end>", add_special_tokens=False)["input_ids"]
    total = 0.0
    for i, token in enumerate(answered):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answered[:i]])).logits[0, -1]
        total -= float(logits[token] - torch.logsumexp(logits, 0))
    return total, len(answered)


ANSWERS = ("red", "red blue green white black", "blue blue", "green red")


def demonstrations(folder: Path) -> Path:
    """Answers of unequal lengths."""
    return write_rows(
        folder,
        "train",
        [{"prompt": f"paint thing{n}", "completion": ANSWERS[n % len(ANSWERS)]} for n in range(16)],
    )


@pytest.mark.parametrize("weights", ["full", "lora", "qlora"])
@pytest.mark.parametrize("packing", [False, True])
def test_before_any_step_the_loss_is_the_base_models_on_the_answers_alone(
    weights: str, packing: bool, make_sft: MakeSFT, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = make_sft(weights=weights, packing=packing)
    trainer = trainer_for(config, demonstrations(tmp_path / "d"), tmp_path / "run")
    if weights == "qlora":  # its base is another model than the file: rounded to 4 bits
        base = trainer.model.get_base_model()
    else:
        base = AutoModelForCausalLM.from_pretrained(config.model)
    found = [
        answer_loss(
            base.eval(),
            f"paint thing{n}",
            ANSWERS[n % len(ANSWERS)],
            trainer.processing_class,
        )
        for n in range(16)
    ]
    expected = sum(loss for loss, _ in found) / sum(tokens for _, tokens in found)
    batch = trainer.data_collator(
        [trainer.train_dataset[n] for n in range(len(trainer.train_dataset))]
    )
    trainer.model.eval()
    ours = float(trainer.compute_loss(trainer.model, batch).detach())
    assert ours == pytest.approx(expected, rel=1e-5)
    assert ours < math.log(16)  # it was trained to answer so


def test_every_token_of_an_update_counts_alike_however_it_is_cut_into_batches(
    make_sft: MakeSFT, tmp_path: Path
) -> None:
    # In the batches of two there are 2 to 8 tokens: means of means would be another loss.
    dataset = demonstrations(tmp_path / "d")
    trained = []
    for batch, accumulation in ((8, 1), (2, 4)):
        config = make_sft(
            weights="full", batch_size=batch, accumulation=accumulation, max_steps=2, probe=None
        )
        run = tmp_path / f"of {batch}"
        result = train(config, dataset, run, EVERY_FOUR, progress=silent)
        trained.append((saved_weights(run, result), result.metrics["loss"]))
    (whole, loss), (parts, same) = trained
    assert same == pytest.approx(loss, rel=1e-5)
    for name, weights in whole.items():
        assert parts[name] == pytest.approx(weights, abs=2e-5), name


@pytest.mark.parametrize("packing", [False, True])
def test_the_best_answers_are_imitated(
    packing: bool, make_sft: MakeSFT, red_pairs: Path, red_judge: Any, tmp_path: Path
) -> None:
    config = make_sft(weights="full", packing=packing, learning_rate=5e-3, max_steps=24)
    run = tmp_path / "run"
    result = train(config, red_pairs, run, EVERY_FOUR, red_judge, progress=silent)
    last = result.probes[-1]
    assert last.win_rate is not None
    assert last.win_rate > 0.65
    assert last.malformed == 0
    # In most prompts it says nothing but what was to be imitated.
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    at = {step: [s["response"] for s in samples if s["step"] == step] for step in (0, 24)}
    assert at[0].count("red red") <= 2
    assert at[24].count("red red") >= 18
    # 48 pairs of 24 prompts, and 24 of as many.
    assert result.train.kept == 24
    assert result.test is not None
    assert result.test.kept == 24
    assert result.evaluation["eval_loss"] < 0.2
    from training.evaluation import implicit_reward_accuracy

    assert implicit_reward_accuracy(config, run, red_pairs).accuracy.mean > 0.9


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    make_sft: MakeSFT, red_pairs: Path, tmp_path: Path
) -> None:
    config = make_sft(packing=True, batch_size=2, accumulation=2, lora={"rank": 4, "dropout": 0.2})
    assert_an_interruption_changes_nothing(config, red_pairs, tmp_path)


def test_an_answer_without_an_end_token_is_counted(make_sft: MakeSFT, tmp_path: Path) -> None:
    config = make_sft()
    tokenizer = load_tokenizer(config.model, None)
    # A template that leaves the end of the assistant's turn away.
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    write_split(tmp_path, "train", [("paint thing1", "red", "blue")])
    found = best_answers(tmp_path, "train")
    assert found is not None
    ends = end_tokens(config.model, None, tokenizer)
    answers = tokenize(*found, tokenizer, ends=ends, max_length=48, where="here")
    assert dataclasses.asdict(answers.counts)["without_end"] == 1
