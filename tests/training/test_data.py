"""Pairs become tokens; what is dropped on the way is counted with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preferences.errors import InputError
from tests.training.conftest import TEMPLATE, build_tokenizer, write_split
from training.data import Pairs, labelled_rows, load_pairs
from training.dpo import DPOConfig, train


def load(folder: Path, max_length: int = 48, template: str = TEMPLATE) -> Pairs:
    tokenizer = build_tokenizer(template)
    ends = {tokenizer.eos_token_id}
    pairs = load_pairs(folder, "train", tokenizer, ends=ends, max_length=max_length)
    assert pairs is not None
    return pairs


def test_pairs_that_are_too_long_are_dropped_and_counted_with_their_reason(tmp_path: Path) -> None:
    # Tokens: <bos> <user> paint thing1 <end> \n <assistant> = 7, then the answer and <end>.
    long_prompt = " ".join(["paint"] * 9)
    write_split(
        tmp_path,
        "train",
        [
            ("paint thing1", "red red", "blue"),  # 7 + 2 + 1 = 10
            ("paint thing1", "red red red", "blue"),  # 11
            ("paint thing1", "blue", "red red red red"),  # 12
            (long_prompt, "red", "blue"),  # the prompt alone is 5 + 9 = 14
            ("paint thing2", "red", "red"),
        ],
    )
    pairs = load(tmp_path, max_length=10)
    assert (pairs.counts.rows, pairs.counts.kept) == (5, 1)
    assert pairs.counts.dropped == {
        "answer_too_long": 2,
        "prompt_too_long": 1,
        "identical_answers": 1,
    }
    assert [(drop.record_id, drop.detail) for drop in pairs.dropped[:3]] == [
        ("c1>r1", "11 tokens with the prompt"),
        ("c2>r2", "12 tokens with the prompt"),
        ("c3>r3", "14 tokens"),
    ]


def test_an_answer_ends_with_its_end_token_and_not_with_the_newline_of_the_template(
    tmp_path: Path,
) -> None:
    write_split(tmp_path, "train", [("paint thing1", "red red", "blue")])
    row = load(tmp_path).rows[0]
    decode = build_tokenizer().convert_ids_to_tokens
    assert decode(row["prompt_ids"]) == [
        *("<bos>", "<user>", "paint", "thing1", "<end>", "\n", "<assistant>")
    ]
    assert decode(row["chosen_ids"]) == ["red", "red", "<end>"]
    assert decode(row["rejected_ids"]) == ["blue", "<end>"]
    assert row["probability"] == 0.9


def test_a_template_that_never_ends_an_answer_is_counted(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [("paint thing1", "red red", "blue")])
    endless = TEMPLATE.replace("<end>", "")
    assert load(tmp_path, template=endless).counts.without_end == 1


def test_a_template_that_renders_the_prompt_differently_alone_is_counted(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [("paint thing1", "red red", "blue")])
    thinking = TEMPLATE.replace("%}<assistant>{%", "%}<assistant><system>{%")
    pairs = load(tmp_path, template=thinking)
    assert pairs.counts.boundary_shifted == 1
    # The answer starts where the two part, and sampling still uses the prompt as rendered alone.
    assert len(pairs.prompts[0].ids) == len(pairs.rows[0]["prompt_ids"]) + 1


def test_a_conversation_that_the_template_refuses_is_dropped_with_its_words(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [("paint thing1", "red", "blue"), ("no", "red", "blue")])
    strict = (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}"
        + TEMPLATE
    )
    pairs = load(tmp_path, template=strict)
    assert pairs.counts.dropped == {"refused_by_template": 1}
    assert pairs.dropped[0].detail == "not that"


def test_when_nothing_is_left_the_error_says_why_and_what_to_change(tmp_path: Path) -> None:
    write_split(tmp_path, "train", [("paint thing1", "red red", "blue")] * 3)
    with pytest.raises(InputError, match=r"none of the 3 train pairs .*prompt_too_long 3.*raise"):
        load(tmp_path, max_length=7)


def test_a_missing_column_is_named_with_its_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    table = pa.table({"prompt": ["x"], "chosen": ["y"]})
    pq.write_table(table, tmp_path / "data" / "train-00000.parquet")
    with pytest.raises(InputError, match=r"train-00000.parquet: no column rejected, prompt_id"):
        load(tmp_path)


def test_a_tokenizer_without_chat_template_is_refused_with_model_and_cure(
    model: str, red_pairs: Path, make_config: Callable[..., DPOConfig], tmp_path: Path
) -> None:
    build_tokenizer(template=None).save_pretrained(tmp_path / "bare")
    config = make_config(model=str(tmp_path / "bare"))
    with pytest.raises(InputError, match=r"bare: its tokenizer has no chat template.*put"):
        train(config, red_pairs, tmp_path / "run")


def test_balanced_by_prompt_every_prompt_counts_alike_and_the_mean_weight_is_1(
    tmp_path: Path,
) -> None:
    prompts = ["paint thing1", "paint thing2", "paint thing1", "paint thing1"]
    write_split(tmp_path, "train", [(p, "red " * (n + 1), "blue") for n, p in enumerate(prompts)])
    rows = labelled_rows(load(tmp_path), "hard", "prompts")
    # Four pairs of two prompts: each prompt has 4 / 2 to share out among its pairs.
    assert rows["weight"][:] == pytest.approx([2 / 3, 2, 2 / 3, 2 / 3])
    assert rows["probability"][:] == [1.0] * 4
    by_pair = labelled_rows(load(tmp_path), "soft", "pairs")
    assert by_pair["weight"][:] == [1.0] * 4
    assert by_pair["probability"][:] == [0.9] * 4


def test_the_same_folder_is_what_datasets_loads(red_pairs: Path, tmp_path: Path) -> None:
    import datasets

    loaded: Any = datasets.load_dataset(str(red_pairs), cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 48, "test": 24}
    assert loaded["train"][0]["chosen"] == [{"content": "red red", "role": "assistant"}]


def test_dropped_pairs_are_written_into_the_run(
    make_config: Callable[..., DPOConfig], tmp_path: Path
) -> None:
    write_split(tmp_path / "d", "train", [("paint thing1", "red", "blue"), ("paint", "red", "red")])
    train(make_config(max_steps=1, probe=None), tmp_path / "d", tmp_path / "run")
    line = json.loads((tmp_path / "run" / "dropped.jsonl").read_text())
    assert (line["split"], line["reason"]) == ("train", "identical_answers")
