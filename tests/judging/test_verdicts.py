"""Verdicts out of words."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from judging.verdicts import arena_hard, letter


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "first"),
        ("b", "second"),
        (" **B** \n", "second"),
        ("(A).", "first"),
        ("Tie", "tie"),
        ("C", "tie"),
        ("[[A]]", "first"),
        ("I think A is a mess. [[ b ]]", "second"),
        ("[[A]] and again [[A]]", "first"),
        ("[[C]]", "tie"),
        # Two that differ, or none that stands alone, are no verdict.
        ("[[A]] or rather [[B]]", None),
        ("[[A]], no: [[C]]", None),
        ("A or B", None),
        ("A B", None),
        ("A good answer", None),
        ("Neither is a good one", None),
        ("Answer A is better", None),
        ("", None),
        ("AB", None),
        ("10", None),
        ("[[D]]", None),
    ],
)
def test_a_letter_is_read_where_it_is_the_verdict(reply: str, verdict: str | None) -> None:
    assert letter(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A>B]]", "first"),
        ("[[A>>B]]", "first"),
        ("[[A<B]]", "second"),
        ("[[A<<B]]", "second"),
        ("[[B>A]]", "second"),
        ("[[B>>A]]", "second"),
        ("[[B<A]]", "first"),
        ("[[B<<A]]", "first"),
        ("[[A=B]]", "tie"),
        ("[[B=A]]", "tie"),
        ("So my verdict is [[ A >> B ]].", "first"),
        ("[[A>B]] ... [[A>>B]]", "first"),
        ("[[A>B]] ... [[B>A]]", None),
        ("[[A>B]] ... [[A=B]]", None),
        ("A>B", None),
        ("[[A>A]]", None),
        ("[[A>>>B]]", None),
        ("", None),
    ],
)
def test_arena_hards_grammar_is_read_either_way_round(reply: str, verdict: str | None) -> None:
    assert arena_hard(reply) == verdict


WORDS = st.text(st.characters(exclude_characters="[]"), max_size=30)


@given(WORDS, st.sampled_from("AB"), WORDS)
def test_words_around_a_bracketed_letter_change_nothing(
    before: str, verdict: str, after: str
) -> None:
    assert letter(f"{before}[[{verdict}]]{after}") == {"A": "first", "B": "second"}[verdict]


def _judgebench() -> Path:
    data = os.environ.get("PAIRWRIGHT_DATA")
    path = Path(data or "nowhere") / "judgebench" / "judgments.parquet"
    if not path.exists():
        pytest.skip("needs judgebench/judgments.parquet in the folder that PAIRWRIGHT_DATA names")
    return path


def test_judgebenchs_own_code_reads_the_same_in_540_real_replies() -> None:
    rows = pq.read_table(_judgebench(), columns=["reply", "decision_as_shown"]).to_pylist()
    named = {"first": "A>B", "second": "B>A", "tie": "A=B", None: None}
    differ = [r for r in rows if named[arena_hard(r["reply"])] != r["decision_as_shown"]]
    for row in differ:
        # The benchmark reads no verdict where two are given, though both name the same winner.
        assert row["decision_as_shown"] is None
        said = set(re.findall(r"\[\[(.*?)\]\]", row["reply"]))
        assert said == {"A>B", "A>>B"}
    assert (len(rows), len(differ)) == (540, 2)
    # Nothing is read as a side that the benchmark reads as the other.
    pairs = Counter((arena_hard(r["reply"]), r["decision_as_shown"]) for r in rows)
    assert pairs["first", "B>A"] == pairs["second", "A>B"] == 0
