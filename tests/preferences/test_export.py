"""A dataset in the forms that trainers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from preferences.card import dataset_card, dataset_facts
from preferences.errors import InputError
from preferences.export import FORMS, export, kto_rows, plain_text, ranking_rows, write_rows
from preferences.records import Candidate, Message, Prompt, Ranking, Triplet, to_table

ASKED = (Message("system", "Be brief."), Message("user", "Why?"))


def triplet(prompt: str, chosen: str, rejected: str) -> Triplet:
    """The answers' texts are their ids, with `says` before them."""
    return Triplet(
        preference_id=f"{chosen}>{rejected}",
        prompt_id=prompt,
        prompt=ASKED if prompt == "p0" else (Message("user", prompt),),
        chosen=(Message("assistant", f"says {chosen}"),),
        rejected=(Message("assistant", f"says {rejected}"),),
        chosen_id=chosen,
        rejected_id=rejected,
        chosen_model="m",
        rejected_model="n",
        probability=0.75,
        margin=1.5,
    )


# In p0, b won one pair and lost the other.
TRAIN = [triplet("p0", "a", "b"), triplet("p0", "b", "c"), triplet("p1", "d", "e")]
TEST = [triplet("p2", "f", "g")]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A finished dataset of two parts, as the store holds one."""
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    tables = {split: to_table(Triplet, rows) for split, rows in (("train", TRAIN), ("test", TEST))}
    for split, table in tables.items():
        pq.write_table(table, folder / "data" / f"{split}-000-of-001.parquet")
    sides = {split: dataset_facts([table]) for split, table in tables.items()}
    card = dataset_card("pairs", "", "apache-2.0", sides, [], "name: pairs")
    (folder / "README.md").write_text(card)
    return folder


def loaded(dataset: Path, form: str) -> dict[str, list[dict[str, Any]]]:
    import datasets

    output = dataset.parent / form
    counts = export(dataset, output, form, "pairs")
    data = datasets.load_dataset(str(output), cache_dir=str(dataset.parent / "cache"))
    rows = {split: list(data[split]) for split in data}
    assert {split: len(found) for split, found in rows.items()} == counts
    assert {p.name for p in dataset.parent.iterdir()} == {"cache", "dataset", form}
    return rows


def test_the_conversational_form_has_the_columns_trainers_look_for(dataset: Path) -> None:
    rows = loaded(dataset, "conversational")
    assert [r["preference_id"] for r in rows["train"]] == ["a>b", "b>c", "d>e"]
    assert [r["preference_id"] for r in rows["test"]] == ["f>g"]
    for row in rows["train"] + rows["test"]:
        for name in ("prompt", "chosen", "rejected"):
            assert all(set(turn) == {"role", "content"} for turn in row[name])
        assert row["prompt"][-1]["role"] == "user"
        assert [turn["role"] for turn in row["chosen"] + row["rejected"]] == ["assistant"] * 2
        assert row["chosen"] != row["rejected"]
    assert rows["train"][0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]


def test_the_plain_form_is_texts(dataset: Path) -> None:
    rows = loaded(dataset, "plain")["train"]
    assert [(r["chosen"], r["rejected"]) for r in rows] == [
        ("says a", "says b"),
        ("says b", "says c"),
        ("says d", "says e"),
    ]
    assert rows[0]["prompt"] == "System: Be brief.\n\nUser: Why?\n\nAssistant:"
    assert rows[2]["prompt"] == "p1"
    assert all(r["chosen"] != r["rejected"] for r in rows)


def test_the_kto_form_leaves_out_an_answer_that_won_and_lost(dataset: Path) -> None:
    rows = loaded(dataset, "kto")["train"]
    assert {(r["candidate_id"], r["label"]) for r in rows} == {
        ("a", True),
        ("c", False),
        ("d", True),
        ("e", False),
    }
    for row in rows:
        assert row["completion"] == [
            {"role": "assistant", "content": f"says {row['candidate_id']}"}
        ]


def test_an_answer_that_won_twice_is_one_row_of_kto() -> None:
    rows = list(kto_rows([triplet("p0", "a", "b"), triplet("p0", "a", "c")]))
    assert [(r["candidate_id"], r["label"]) for r in rows] == [
        ("a", True),
        ("b", False),
        ("c", False),
    ]


def test_rankings_are_listed_from_the_best_to_the_worst_and_load(tmp_path: Path) -> None:
    import datasets

    candidates = {i: Candidate(i, "p0", f"m{i}", f"says {i}", "complete") for i in "abc"}
    ranking = Ranking("p0", ("a", "b", "c"), (0.5, -1.0, 2.0), (0.0,) * 9, ("j",))
    prompts = {"p0": Prompt("p0", ASKED, "p.jsonl:1")}
    path = tmp_path / "train.parquet"
    assert write_rows(path, ranking_rows([ranking], prompts, candidates)) == 1
    data = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    (row,) = data["train"]
    assert row["completions"] == ["says c", "says a", "says b"]
    assert row["scores"] == [2.0, 0.5, -1.0]
    assert row["models"] == ["mc", "ma", "mb"]
    assert row["candidate_ids"] == ["c", "a", "b"]


def test_an_export_never_overwrites_and_leaves_nothing_half_done(dataset: Path) -> None:
    output = dataset.parent / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="already exists; name a new folder"):
        export(dataset, output, "plain", "pairs")
    assert (output / "mine.txt").read_text() == "precious"
    with pytest.raises(InputError, match="no form 'dpo'; there are: conversational, plain, kto"):
        export(dataset, dataset.parent / "new", "dpo", "pairs")
    (dataset / "README.md").unlink()
    with pytest.raises(FileNotFoundError):
        export(dataset, dataset.parent / "new", "plain", "pairs")
    assert sorted(p.name for p in dataset.parent.iterdir()) == ["dataset", "out"]


def test_the_forms_are_those_the_documents_name() -> None:
    assert FORMS == ("conversational", "plain", "kto")
    assert plain_text((Message("user", "Why?"),)) == "Why?"


def test_the_facts_of_a_dataset_are_counted_by_hand() -> None:
    longer = triplet("p3", "a very long answer", "short")
    tables = [to_table(Triplet, rows) for rows in ([], TRAIN[:1], [*TRAIN[1:], longer])]
    facts = dataset_facts(tables)
    assert facts is not None
    # p0 stands on both sides of a table's end and is one prompt.
    assert (facts.rows, facts.prompts, facts.mean_probability) == (4, 3, 0.75)
    # Only the last is longer: `says ` and 18 characters, 5 + 18 = 23, against 5 + 5 = 10.
    assert facts.chosen_longer == 0.25
    assert facts.chosen_characters == (6 * 3 + 23) / 4
    assert facts.rejected_characters == (6 * 3 + 10) / 4
    assert dataset_facts([]) is None
