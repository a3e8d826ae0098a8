"""Questions to people as a table, and their answers as judgments."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from judging.judge import Group
from judging.people import Question, TableOfLabels, answers_on, question
from preferences.errors import InputError
from preferences.records import Dropped, Judgment
from tests.judging.groups import group

Cells = dict[str, str]
HOSTILE = (
    "=cmd|' /C calc'!A0",
    "'=1+1",
    "''@x",
    "-1 point",
    "\tindented",
    "\r\nnew line first",
    "＝SUM(A1)",
    'said "so", twice\nand "again"\r\rthen',
    "שלום \u202e left to right",
    "{{answer}} </answer> ]]>",
    "\x00\x07 control",
    "half a pair \ud83d",
    "long " * 2000,
    "x" * 140_000,
)
KINDS = pytest.mark.parametrize("kind", ["csv", "jsonl"])


def questions(*answers: str, purpose: str = "ask") -> list[Question]:
    """A prompt for every two answers that follow each other, with a question about them."""
    return [
        question(one.prompt, one.candidates, purpose)  # type: ignore[arg-type]
        for n, (a, b) in enumerate(pairwise(answers))
        for one in [group(a, b, question=f"{n}: {a}")]
    ]


def read(path: Path) -> list[Cells]:
    """The table as it stands in the file."""
    csv.field_size_limit(2**31 - 1)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def fill(path: Path, said: Callable[[Cells], Cells]) -> None:
    """Have somebody write into every row."""
    rows = [{**row, **said(row)} for row in read(path)]
    write(path, rows)


def write(path: Path, rows: list[Cells]) -> None:
    """Save the table as a spreadsheet or an editor would."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def judgments(table: TableOfLabels) -> list[Judgment]:
    """The answers, none of which was dropped."""
    found = list(table.answers())
    assert all(isinstance(answer, Judgment) for answer in found), found
    return [answer for answer in found if isinstance(answer, Judgment)]


def winner(judgment: Judgment) -> str | None:
    """The id of the answer that was preferred; None for a tie."""
    places = {"first": 0, "second": 1}
    return (
        None
        if judgment.verdict == "tie"
        else judgment.candidate_ids[places[judgment.verdict or ""]]
    )


@KINDS
@settings(max_examples=60, deadline=None)
@given(
    told=st.lists(
        st.tuples(
            st.text(max_size=60),
            st.text(max_size=60),
            st.sampled_from(["better", "worse", "neither"]),
            st.sampled_from(["A", "a", " A ", "a\n"]),
        ),
        min_size=1,
        max_size=12,
    ),
    shuffled=st.randoms(),
)
@example(told=[(f"{text} one", f"{text} two", "better", "A") for text in HOSTILE], shuffled=None)
@example(told=[(text, text[::-1], "worse", "A") for text in HOSTILE], shuffled=None)
def test_no_answer_is_flipped_on_its_way_through_the_table(
    kind: str, told: list[tuple[str, str, str, str]], shuffled: object
) -> None:
    with TemporaryDirectory() as folder:
        table = TableOfLabels(Path(folder) / f"labels.{kind}")
        groups = [
            group(one, two, question=f"question {n}") for n, (one, two, *_) in enumerate(told)
        ]
        table.ask(question(g.prompt, g.candidates, "ask") for g in groups)
        liked: dict[str, str | None] = {}
        said: dict[str, str] = {}
        for of, (_, _, verdict, spelling) in zip(groups, told, strict=True):
            one, other = of.candidates
            asked = question(of.prompt, (one, other), "ask")
            preferred = {"better": one, "worse": other, "neither": None}[verdict]
            liked[of.prompt.prompt_id] = preferred.candidate_id if preferred else None
            letter = "A" if preferred == asked.candidates[0] else "B"
            said[asked.question_id] = (
                spelling.replace("A", letter).replace("a", letter.lower()) if preferred else "Tie"
            )
        rows = [{**row, "verdict": said[row["question_id"]]} for row in read(table.path)]
        if shuffled is not None:
            shuffled.shuffle(rows)  # type: ignore[attr-defined]
        write(table.path, rows)
        for _ in range(2):  # And again after the table was written anew.
            found = {j.prompt_id: winner(j) for j in judgments(table)}
            assert found == liked
            extra = group("more", "less", question="another")
            more = question(extra.prompt, extra.candidates, "ask")
            table.ask([more, *(question(g.prompt, g.candidates, "ask") for g in groups)])


@KINDS
@pytest.mark.parametrize("text", HOSTILE)
def test_people_read_the_texts_as_they_were_written(kind: str, text: str, tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    of = group(text, f"not {text}", question=text + " is the question")
    asked = question(of.prompt, of.candidates, "ask")
    table.ask([asked])
    [cells] = read(table.path)
    shown = [cells["prompt"], cells["answer_a"], cells["answer_b"]]
    texts = [of.prompt.messages[0].content, *(c.response for c in asked.candidates)]
    meant = [text.encode("utf-8", "replace").decode() for text in texts]
    if kind == "csv":
        for cell in shown:
            assert cell[0] not in "=+-@\t\r\n＝"  # Or a spreadsheet would run it.
        # The apostrophe that disarms a formula is all that may be before the text.
        shown = [c if c == m else c[1:] for c, m in zip(shown, meant, strict=True)]
    assert shown == meant


def test_each_answer_stands_first_half_of_the_time() -> None:
    first = low = 0
    for n in range(2000):
        of = group(f"good {n}", f"bad {n}", question=str(n))
        asked = question(of.prompt, of.candidates, "ask")
        # However the pair is named, the question is the same.
        assert question(of.prompt, of.candidates[::-1], "ask") == asked
        first += asked.candidates[0] == of.candidates[0]
        low += asked.candidates[0].candidate_id < asked.candidates[1].candidate_id
    # 1,000 ± 3.3 standard deviations of √500 = 22.4.
    assert abs(first - 1000) < 74
    assert abs(low - 1000) < 74


def test_ids_are_no_numbers_to_a_spreadsheet() -> None:
    # Which take 12345678 or 1234e567 for one, and round it.
    assert all(one.question_id[0].isalpha() for one in questions(*map(str, range(100))))


@KINDS
def test_an_unanswered_question_stays_unanswered(kind: str, tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    assert list(table.answers()) == []  # There is no table yet.
    asked = questions("a", "b", "c", "d")
    table.ask(asked)
    assert judgments(table) == []
    fill(table.path, lambda row: {"verdict": "  ", "annotator": "ann", "reason": "hard to say"})
    assert judgments(table) == []
    fill(table.path, lambda row: {"verdict": "A" if row["answer_a"] in "ab" else ""})
    assert {j.prompt_id for j in judgments(table)} == {
        q.prompt.prompt_id for q in asked if q.candidates[0].response in "ab"
    }


@KINDS
def test_writing_the_questions_again_keeps_what_was_answered(kind: str, tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    old, kept, new = questions("a", "b", "c", "d")
    table.ask([old, kept])
    said = {"verdict": "both bad", "annotator": "-ann", "reason": "=1, no: neither", "mood": "low"}
    fill(table.path, lambda row: said if row["question_id"] == kept.question_id else {"mood": ""})
    before = judgments(table)
    # Of the two, one is asked no more, and nobody had answered it.
    table.ask([kept, new])
    assert judgments(table) == before
    assert len(read(table.path)) == 2
    rows = {row["question_id"]: row for row in read(table.path)}
    assert rows.keys() == {kept.question_id, new.question_id}
    assert rows[kept.question_id]["mood"] == "low"
    # Now nobody asks the answered one, and it stays all the same.
    table.ask([new])
    assert judgments(table) == before
    assert before[0].reply == "both bad: =1, no: neither"
    assert (before[0].verdict, before[0].annotator) == ("tie", "-ann")


@KINDS
def test_a_table_that_asks_all_there_is_to_ask_is_left_alone(kind: str, tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    asked = questions(*HOSTILE)
    table.ask(asked)
    bytes_before, node = table.path.read_bytes(), table.path.stat().st_ino
    table.ask(reversed(asked))
    assert table.path.stat().st_ino == node  # Not even replaced by the same.
    write(table.path, read(table.path)[::-1])  # Somebody sorts it: that is not undone.
    node = table.path.stat().st_ino
    table.ask(asked)
    assert table.path.stat().st_ino == node
    table.path.unlink()
    table.ask(asked)
    assert table.path.read_bytes() == bytes_before


@KINDS
def test_each_annotator_has_a_row_and_a_judgment(kind: str, tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    [asked] = questions("a", "b")
    table.ask([asked])
    [row] = read(table.path)
    # The second only copied the id.
    rows = [{**row, "annotator": "ann", "verdict": "A"}]
    rows.append({**dict.fromkeys(row, ""), "question_id": row["question_id"]})
    rows[1] |= {"annotator": "bob", "verdict": "B"}
    write(table.path, rows)
    found = {j.annotator: winner(j) for j in judgments(table)}
    assert found == {
        "ann": asked.candidates[0].candidate_id,
        "bob": asked.candidates[1].candidate_id,
    }
    assert len({j.judgment_id for j in judgments(table)}) == 2


@KINDS
def test_rows_made_ready_for_more_annotators_stay(kind: str, tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    [asked, more] = questions("a", "b", "c")
    table.ask([asked])
    write(table.path, 3 * read(table.path))
    table.ask([asked, more])
    assert len(read(table.path)) == 4


@KINDS
def test_who_contradicts_himself_says_nothing_and_copies_count_once(
    kind: str, tmp_path: Path
) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    [asked] = questions("a", "b")
    table.ask([asked])
    [row] = read(table.path)
    said = [("ann", "A"), ("ann", "b"), ("bob", "A"), ("bob", "a "), ("", "tie"), ("", "A")]
    write(table.path, [{**row, "annotator": who, "verdict": v} for who, v in said])
    answers = list(table.answers())
    assert [j.annotator for j in answers if isinstance(j, Judgment)] == ["bob"]
    dropped = sorted(d.reason for d in answers if isinstance(d, Dropped))
    assert dropped == ["contradicts_itself", "contradicts_itself", "duplicate"]
    assert all(d.prompt_id == asked.prompt.prompt_id for d in answers)


@KINDS
def test_a_row_of_an_unknown_question_is_dropped(kind: str, tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    one, other = questions("a", "b", "c")
    table.ask([one, other])
    rows = [{**row, "verdict": "A"} for row in read(table.path)]
    # Somebody sorted one column and not the others.
    rows[0]["about"], rows[1]["about"] = rows[1]["about"], rows[0]["about"]
    rows.append({**rows[0], "question_id": "q1", "about": "ask p a b"})
    rows.append({**rows[0], "question_id": "", "about": ""})
    write(table.path, rows)
    assert [d.reason for d in table.answers()] == ["unknown_question"] * 4  # type: ignore[union-attr]


@KINDS
def test_sides_that_were_exchanged_fit_no_question(kind: str, tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    [asked] = questions("a", "b")
    table.ask([asked])
    purpose, prompt, a, b = read(table.path)[0]["about"].split()
    fill(table.path, lambda row: {"verdict": "A", "about": f"{purpose} {prompt} {b} {a}"})
    assert [type(answer) for answer in table.answers()] == [Dropped]


@KINDS
@pytest.mark.parametrize("verdict", ["C", "A or B", "AB", "first", "1", "=A"])
def test_a_verdict_that_cannot_be_read_is_named_with_its_row(
    kind: str, verdict: str, tmp_path: Path
) -> None:
    table = TableOfLabels(tmp_path / f"labels.{kind}")
    [asked] = questions("a", "b")
    table.ask([asked])
    fill(table.path, lambda row: {"verdict": verdict})
    place = f"labels.{kind}:{2 if kind == 'csv' else 1}: question '{asked.question_id}'"
    with pytest.raises(InputError, match=f"{place} has the verdict '{verdict}'; write A, B, tie"):
        list(table.answers())


def test_a_table_saved_with_semicolons_is_told_from_one_without_questions(tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / "labels.csv")
    table.path.write_text("question_id;prompt;answer_a;answer_b;verdict;about\n" + ";" * 5 + "\n")
    with pytest.raises(InputError, match=r"only one column, 'question_id;prompt.*with commas"):
        list(table.answers())


def test_a_table_without_verdicts_is_named(tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / "labels.jsonl")
    table.path.write_text('{"question_id": "q1", "about": ""}\n')
    with pytest.raises(InputError, match=r"labels.jsonl:1: no column 'verdict'"):
        list(table.answers())


def test_a_table_is_csv_or_json_lines() -> None:
    for name in ("labels.xlsx", "labels.parquet", "labels.csv.gz", "labels"):
        with pytest.raises(InputError, match=r"name a \.csv or \.jsonl file"):
            TableOfLabels(name)


def test_answers_on_what_is_no_longer_there_are_dropped(tmp_path: Path) -> None:
    table = TableOfLabels(tmp_path / "labels.csv")
    here, gone, changed = (group("a", "b", question=q) for q in ("here", "gone", "changed"))
    table.ask(question(g.prompt, g.candidates, "ask") for g in (here, gone, changed))
    fill(table.path, lambda row: {"verdict": "A"})
    left = Group(changed.prompt, changed.candidates[:1])
    found = list(answers_on([here, left], table.answers()))
    assert [j.prompt_id for j in found if isinstance(j, Judgment)] == [here.prompt.prompt_id]
    assert {(d.prompt_id, d.reason) for d in found if isinstance(d, Dropped)} == {
        (gone.prompt.prompt_id, "unknown_prompt"),
        (changed.prompt.prompt_id, "unknown_candidate"),
    }


def test_a_question_for_each_pair_has_an_id_of_its_own() -> None:
    of: Group = group("a", "b", "c", "d")
    ids = {question(of.prompt, pair, "ask").question_id for pair in combinations(of.candidates, 2)}
    assert len(ids) == 6
