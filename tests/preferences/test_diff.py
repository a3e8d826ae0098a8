"""What changed between two datasets."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from preferences.diff import Difference, diff, difference
from preferences.export import plain_table
from preferences.pair_table import pair_table
from preferences.records import Message, Triplet, to_table
from preferences.text_pairs import TextPair


def pair(
    name: str, prompt: str = "Why?", probability: float | None = 0.8, split: str = "train"
) -> TextPair:
    """`ab` prefers the answer a to the answer b; its id is the prompt and that."""
    texts = f"answer {name[0]}", f"answer {name[1]}"
    return TextPair(f"{prompt}{name}", split, prompt, *texts, probability)


def compared(before: list[TextPair], after: list[TextPair]) -> Difference:
    return difference(pair_table(before), pair_table(after))


def counts(found: Difference) -> dict[str, int]:
    """The kinds of change that happened."""
    return {change.kind: change.count for change in found.changes if change.count}


def examples(found: Difference, kind: str) -> tuple[str, ...]:
    return next(change.examples for change in found.changes if change.kind == kind)


def test_each_kind_of_change_is_counted_with_its_pairs() -> None:
    before = [
        pair("ab"), pair("cd"), pair("ef"), pair("gh"), pair("ab", "When?"), pair("ab", "Who?"),
    ]  # fmt: skip
    after = [
        pair("ab"),
        pair("dc"),
        pair("ef", probability=0.9),
        pair("ij"),
        pair("ab", "When?", split="test"),
        pair("ab", "Where?"),
        pair("cd", "Where?"),
    ]
    found = compared(before, after)
    assert (found.pairs, found.prompts) == ((6, 7), (3, 3))
    assert counts(found) == {
        "prompts_added": 1,
        "prompts_removed": 1,
        "pairs_added": 3,
        "pairs_removed": 2,
        "pairs_flipped": 1,
        "probability_changed": 1,
        "moved_to_another_split": 1,
        "unchanged": 1,
    }
    assert examples(found, "prompts_added") == ("Where?ab",)
    assert examples(found, "pairs_added") == ("Why?ij", "Where?ab", "Where?cd")
    assert examples(found, "pairs_removed") == ("Why?gh", "Who?ab")
    assert examples(found, "pairs_flipped") == ("Why?dc",)
    assert examples(found, "probability_changed") == ("Why?ef: 0.800 to 0.900",)
    assert examples(found, "moved_to_another_split") == ("When?ab: train to test",)


def test_white_space_and_ids_are_no_change() -> None:
    ours = pair("ab")
    theirs = dataclasses.replace(ours, pair_id="else", chosen=" answer\na", prompt="Why?\n")
    assert counts(compared([ours], [theirs])) == {"unchanged": 1}


def test_a_pair_that_comes_in_both_directions_is_added_and_not_flipped() -> None:
    assert counts(compared([pair("ab")], [pair("ab"), pair("ba")])) == {
        "pairs_added": 1,
        "unchanged": 1,
    }
    assert counts(compared([pair("ab"), pair("ba")], [pair("ab")])) == {
        "pairs_removed": 1,
        "unchanged": 1,
    }


def test_the_largest_changes_of_probability_come_first_and_a_missing_one_is_a_change() -> None:
    before = [pair("ab", probability=0.6)]
    before += [pair("cd", probability=0.6), pair("ef", probability=None), pair("gh", "Q")]
    after = [pair("ab", probability=0.7), pair("cd", probability=0.9), pair("ef"), pair("gh", "Q")]
    found = compared(before, after)
    assert counts(found) == {"probability_changed": 3, "unchanged": 1}
    assert examples(found, "probability_changed") == (
        "Why?ef: nan to 0.800",
        "Why?cd: 0.600 to 0.900",
        "Why?ab: 0.600 to 0.700",
    )


NAMES = st.lists(
    st.tuples(st.sampled_from(["ab", "ba", "ac", "bc", "cb"]), st.sampled_from(["Q", "R"])),
    unique=True,
)


@settings(max_examples=150, deadline=None)
@given(NAMES, NAMES, st.randoms())
def test_every_pair_is_accounted_for_in_any_order(
    old: list[tuple[str, str]], new: list[tuple[str, str]], draw: Random
) -> None:
    before, after = [pair(*name) for name in old], [pair(*name) for name in new]
    found = counts(compared(before, after))
    # What is before goes on, goes away or is turned round; what is after went on or came or turned.
    kept, turned = found.get("unchanged", 0), found.get("pairs_flipped", 0)
    assert kept == len(set(old) & set(new))
    assert kept + turned + found.get("pairs_removed", 0) == len(old)
    assert kept + turned + found.get("pairs_added", 0) == len(new)
    draw.shuffle(before)
    draw.shuffle(after)
    assert counts(compared(before, after)) == found
    back = Counter(counts(compared(after, before)))
    assert back["pairs_added"] == found.get("pairs_removed", 0)
    assert back["pairs_flipped"] == turned


def test_a_dataset_and_its_plain_export_are_the_same(tmp_path: Path) -> None:
    triplets = to_table(
        Triplet,
        [
            Triplet(
                preference_id=f"t{n}",
                prompt_id=f"p{n}",
                prompt=(Message("user", f"Question {n}?"),),
                chosen=(Message("assistant", f"Yes {n}."),),
                rejected=(Message("assistant", f"No {n}."),),
                chosen_id=f"c{n}",
                rejected_id=f"r{n}",
                chosen_model="m",
                rejected_model="m",
                probability=0.7,
                margin=0.8,
            )
            for n in range(3)
        ],
    )
    tables: dict[str, pa.Table] = {"store": triplets, "export": plain_table(triplets)}
    for name, table in tables.items():
        (tmp_path / name / "data").mkdir(parents=True)
        pq.write_table(table, tmp_path / name / "data" / "train-000-of-001.parquet")
    found = diff(str(tmp_path / "store"), str(tmp_path / "export"))
    assert (found.pairs, counts(found)) == ((3, 3), {"unchanged": 3})
