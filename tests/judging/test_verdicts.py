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

from judging.verdicts import alone, arena_hard, final, letter, order, score


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


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A is right, B is not.\n\n[[A]]", "first"),
        ("Long reasons.\n**Final verdict: [[B]]**\n\n", "second"),
        ("My final verdict is: [[ tie ]].", "tie"),
        ("So the answer is [[c]]", "tie"),
        ("### Verdict\r\n`[[A]]`", "first"),
        ("[[A]]", "first"),
        # The last line binds, whatever was considered before it.
        ("At first [[B]] seems better.\n[[B]]\nBut no.\n[[A]]", "first"),
        # What is said about a verdict, or quoted, is none.
        ("Answer B ends with [[B]]", None),
        ('The second answer says "[[B]]"', None),
        ("> [[B]]", None),
        ('"[[B]]"', None),
        ("[[A]]\nI hope this helps.", None),
        ("[[A]] or [[B]]", None),
        ("[[A]] [[A]]", None),
        ("not [[A]]", None),
        ("[[A]]?", None),
        ("[A]", None),
        ("A", None),
        ("[[A]]\u2028but in truth [[B]]", None),
        ("", None),
        ("\n\n", None),
    ],
)
def test_a_verdict_after_reasons_stands_alone_on_the_last_line(
    reply: str, verdict: str | None
) -> None:
    assert final(reply) == verdict


@pytest.mark.parametrize("before", ["\n", "\r", "\r\n", "\n\n \n"])
def test_any_line_break_begins_the_last_line(before: str) -> None:
    assert final(f"I say [[B]] is wrong.{before}[[A]]") == "first"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "first"),
        ("[[B]]", "second"),
        ("**tie**", "tie"),
        ("The answer says [[B]]", None),
        ("A\nA", None),
        ("", None),
    ],
)
def test_a_verdict_alone_is_the_whole_reply(reply: str, verdict: str | None) -> None:
    assert alone(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("1", 1),
        (" **5**\n", 5),
        ("[3].", 3),
        ("0", None),
        ("6", None),
        ("10", None),
        ("4.5", None),
        ("4/5", None),
        ("-1", None),
        ("４", None),  # a digit, and not one of ours
        ("three", None),
        ("Score: 3", None),
        ("", None),
    ],
)
def test_a_score_is_a_digit_that_is_all_the_reply_says(reply: str, found: int | None) -> None:
    assert score(reply) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("B > A > C", (("B",), ("A",), ("C",))),
        ("B>A=C", (("B",), ("A", "C"))),
        ("A = B = C", (("A", "B", "C"),)),
        ("B is the best.\n\n**C > B > A.**", (("C",), ("B",), ("A",))),
        # Every answer has its place once, or there is no order.
        ("B > A", None),
        ("B > A > C > D", None),
        ("B > A > B > C", None),
        ("B > A > C > B", None),
        ("A, B, C", None),
        ("A < B < C", None),
        ("a > b > c", None),
        ("A > > B > C", None),
        ("The order is B > A > C", None),
        ('"B > A > C"', None),
        ("B > A > C\nThis is my order.", None),
        (">", None),
        ("", None),
    ],
)
def test_an_order_holds_every_label_once(
    reply: str, found: tuple[tuple[str, ...], ...] | None
) -> None:
    assert order(reply, "ABC") == found


LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@given(st.integers(1, 26).flatmap(lambda n: st.permutations(LABELS[:n])), st.randoms())
def test_any_order_that_is_written_is_read_back(labels: list[str], random) -> None:  # type: ignore[no-untyped-def]
    signs = [random.choice(">=") for _ in labels[1:]]
    written = labels[0] + "".join(f" {s} {x}" for s, x in zip(signs, labels[1:], strict=True))
    found = order(written, LABELS[: len(labels)])
    assert found is not None
    assert [label for tier in found for label in tier] == labels
    assert len(found) == 1 + signs.count(">")


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
