"""Rankings come out of a dataset's pairs as they went in."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preferences.assembly import assemble, triplets
from preferences.errors import InputError
from preferences.policies import PairsConfig
from preferences.records import Candidate, Message, Preference, Prompt, Ranking, to_table
from tests.training.conftest import COLOURS, build_tokenizer
from tests.training.ranked import pair_rows, ranked, write_rows
from training.ranked import RankedDPOConfig, load_data
from training.ranked_lists import Lists, best_first, load_lists

TOKENIZER = build_tokenizer()
END = TOKENIZER.eos_token_id


def read(dataset: Path, **changes: Any) -> Lists:
    given: dict[str, Any] = {"ends": {END}, "max_length": 32, **changes}
    lists = load_lists(dataset, "train", TOKENIZER, **given)
    assert lists is not None
    return lists


def texts(row: dict[str, Any]) -> list[str]:
    """A list's answers in its order."""
    return [TOKENIZER.decode(ids[:-1]) for ids in row["answers_ids"]]


def told(row: dict[str, Any]) -> list[tuple[str, str]]:
    """A list's pairs by their texts."""
    said = texts(row)
    return [(said[b], said[w]) for b, w in zip(row["better"], row["worse"], strict=True)]


@st.composite
def rankings(draw: st.DrawFn) -> list[tuple[list[str], list[float], list[str]]]:
    """Prompts' answers, some the same, with means, some tied; and the order they are listed in."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        words = st.lists(st.sampled_from(COLOURS), min_size=1, max_size=3).map(" ".join)
        answers = draw(st.lists(words, min_size=2, max_size=5))
        means = st.lists(st.integers(-4, 4).map(float), min_size=len(answers))
        values = draw(means)[: len(answers)]
        found.append((answers, values, draw(st.permutations("abcde"))))
    return found


@given(rankings(), st.sampled_from([0.5, 0.75]))
@settings(deadline=None, max_examples=20)
def test_no_pair_is_turned_round_or_lost_or_put_to_another_prompt(
    drawn: list[tuple[list[str], list[float], list[str]]], min_probability: float
) -> None:
    candidates: dict[str, Candidate] = {}
    prompts, ranked_by = [], []
    for n, (answers, means, names) in enumerate(drawn):
        prompt_id = f"p{n}"
        prompts.append(Prompt(prompt_id, (Message("user", f"paint thing{n}"),), "here:1"))
        made = [
            Candidate(f"{prompt_id}/{name}", prompt_id, "m", answer, "complete")
            for name, answer in zip(names, answers, strict=False)
        ]
        candidates |= {c.candidate_id: c for c in made}
        ids = tuple(c.candidate_id for c in made)
        ranked_by.append(Ranking(prompt_id, ids, tuple(means), (), ("j",)))

    def wins(ranking: Ranking, one: int, other: int) -> float:
        return 1 / (1 + math.exp(ranking.mean[other] - ranking.mean[one]))

    def said(candidate_id: str) -> str:
        return candidates[candidate_id].response

    config = PairsConfig(policy="all_pairs", min_probability=min_probability)
    kept = [
        record
        for record in assemble(ranked_by, candidates, config, wins)
        if isinstance(record, Preference)
    ]
    if not kept:
        return
    made_of = (to_table(Prompt, prompts), to_table(Candidate, candidates.values()))
    with TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        table = triplets(to_table(Preference, kept), *made_of)
        pq.write_table(table, Path(folder) / "data" / "train-0.parquet")
        found = read(Path(folder), margins=True)
    for prompt in prompts:
        rows = [row for row in found.rows if row["prompt_id"] == prompt.prompt_id]
        expected = sorted(
            (
                *(candidates[n].response for n in (p.chosen_id, p.rejected_id)),
                p.probability,
                p.margin,
            )
            for p in kept
            if p.prompt_id == prompt.prompt_id
        )
        listed = [
            (*pair, sure, margin)
            for row in rows
            for pair, sure, margin in zip(told(row), row["probability"], row["margin"], strict=True)
        ]
        assert sorted(listed) == expected
        for row in rows:
            assert TOKENIZER.decode(row["prompt_ids"]).count(prompt.messages[0].content) == 1
            # The best first; each text once.
            assert all(b < w for b, w in zip(row["better"], row["worse"], strict=True))
            assert len(set(texts(row))) == len(texts(row))


@given(st.permutations(range(6)), st.data())
def test_whatever_beats_another_stands_before_it(order: list[int], data: st.DataObject) -> None:
    every = list(itertools.combinations(order, 2))
    assert best_first(6, every) == order
    some = data.draw(st.lists(st.sampled_from(every), unique=True))
    found = best_first(6, some)
    assert all(found.index(better) < found.index(worse) for better, worse in some)


def test_a_prompt_with_three_of_four_answers_counts(tmp_path: Path) -> None:
    long = " ".join(["blue"] * 40)
    rows = pair_rows("paint thing1", ranked(["red", long, "green", "white"]))
    lists = read(write_rows(tmp_path, "train", rows))
    (row,) = lists.rows
    assert texts(row) == ["red", "green", "white"]
    assert told(row) == [("red", "green"), ("red", "white"), ("green", "white")]
    # Five of the prompt, forty words, the end.
    assert [(d.record_id, d.reason, d.detail) for d in lists.dropped] == [
        (
            f"paint thing1/{long}",
            "answer_too_long",
            f"{len(row['prompt_ids']) + 41} tokens with the prompt",
        )
    ]
    assert (lists.counts.kept, lists.counts.rows, lists.counts.answers_left_out) == (1, 1, 1)


def test_prompts_without_two_answers_to_compare_are_dropped_with_a_reason(tmp_path: Path) -> None:
    long = " ".join(["blue"] * 40)
    rows = [
        *pair_rows("paint thing1", ranked(["red", "blue", "green"])),
        *pair_rows("paint thing2", [(long, "red")]),
        *pair_rows(" ".join(["paint"] * 40), ranked(["red", "blue"])),
        *pair_rows("paint thing3", [("red", "red ")]),
    ]
    lists = read(write_rows(tmp_path, "train", rows))
    assert [row["prompt_id"] for row in lists.rows] == ["p-paint thing1"]
    assert lists.counts.dropped == {
        "answer_too_long": 1,
        "identical_answers": 1,
        "prompt_too_long": 1,
    }
    assert (lists.counts.rows, lists.counts.kept, len(lists.dropped)) == (4, 1, 3)
    with pytest.raises(InputError, match=r"none of the 4 prompts .*raise max_length, now 3"):
        read(tmp_path, max_length=3)


def test_pairs_in_a_circle_have_pair_losses_and_no_ranking(tmp_path: Path) -> None:
    circle = [("red", "blue"), ("blue", "green"), ("green", "red")]
    rows = pair_rows("paint thing1", circle) + pair_rows("paint thing2", ranked(["red", "blue"]))
    write_rows(tmp_path, "train", rows)
    assert sorted(told(read(tmp_path).rows[0])) == sorted(circle)
    lists = read(tmp_path, rankable=True)
    assert [row["prompt_id"] for row in lists.rows] == ["p-paint thing2"]
    assert [(d.reason, d.detail) for d in lists.dropped] == [
        ("not_rankable", "the pairs go in a circle")
    ]


def test_pairs_of_a_prompt_need_not_stand_together(tmp_path: Path) -> None:
    pairs = pair_rows("paint thing1", ranked(["red", "blue", "green"]))
    others = pair_rows("paint thing2", ranked(["white", "black", "red"]))
    mixed = [row for both in zip(pairs, others, strict=True) for row in both]
    lists = read(write_rows(tmp_path, "train", mixed))
    assert [texts(row) for row in lists.rows] == [
        ["red", "blue", "green"],
        ["white", "black", "red"],
    ]


def test_a_dataset_of_pairs_alone_is_refused_with_a_cure(model: str, tmp_path: Path) -> None:
    rows = pair_rows("paint thing1", ranked(["red", "blue"]))
    config = RankedDPOConfig(model=model)
    with pytest.raises(InputError, match=r"pairs.policy: all_pairs .*, or train with method: dpo"):
        load_data(config, write_rows(tmp_path, "train", rows), TOKENIZER)


def test_labels_are_what_the_loss_takes_them_for(model: str, tmp_path: Path) -> None:
    rows = pair_rows("paint thing1", ranked(["red", "blue", "green"]))

    def labels(dataset: Path, **changes: Any) -> tuple[list[float], list[float]]:
        lists, _ = load_data(RankedDPOConfig(model=model, **changes), dataset, TOKENIZER)
        assert lists is not None
        return lists.rows[0]["probability"], lists.rows[0]["margin"]

    write_rows(tmp_path, "train", rows)
    assert labels(tmp_path) == ([1, 1, 1], [0, 0, 0])
    assert labels(tmp_path, label_smoothing=0.25) == ([0.75] * 3, [0, 0, 0])
    assert labels(tmp_path, labels="soft", margin=0.5) == ([0.9] * 3, [1, 1, 1])
    bare = [{**row, "probability": None, "margin": None} for row in rows]
    unsure = write_rows(tmp_path / "unsure", "train", bare)
    assert labels(unsure) == ([1, 1, 1], [0, 0, 0])
    with pytest.raises(InputError, match=r"p-paint thing1: a pair's probability is None.*hard"):
        labels(unsure, labels="soft")
    with pytest.raises(InputError, match=r"its margin is None; .*say margin: 0"):
        labels(unsure, margin=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"loss": "plackett_luce", "labels": "soft"},
            "labels: soft means nothing to loss: plackett",
        ),
        ({"loss": "plackett_luce", "label_smoothing": 0.1}, "label_smoothing means nothing"),
        ({"loss": "plackett_luce", "margin": 1}, "margin means nothing to loss: plackett_luce"),
        ({"loss": "hinge", "labels": "soft"}, "labels: soft means nothing to loss: hinge"),
        ({"labels": "soft", "label_smoothing": 0.1}, "both say how sure a label is; give one"),
        ({"loss": "robust"}, r"robust needs label_smoothing, the share of wrong labels, as 0.1"),
        ({"loss": "bco_pair"}, "Input should be 'sigmoid'"),
    ],
)
def test_what_means_nothing_together_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RankedDPOConfig(model="m", **changes)
