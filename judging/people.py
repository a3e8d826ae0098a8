"""Asking people which answers are better, and reading what they say.

`People` is what labelling tools have in common. The first of them is a table: a file of questions
that people fill in with a spreadsheet or an editor.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from judging.judge import Group
from judging.rubric import conversation_text
from judging.verdicts import order
from preferences.errors import InputError
from preferences.fingerprint import fingerprint
from preferences.records import Candidate, Dropped, Judgment, Prompt, Verdict
from preferences.store import full_disk_explained
from preferences.tables import column, read_rows, table_suffix

Purpose = Literal["calibrate", "ask", "gold"]
"""`calibrate`: for the random slice by which the judges are measured; `ask`: for its own worth;
`gold`: the right answer is known, and it is people who are measured."""

NAME = "people"
"""The judge's name in people's judgments; the annotator's stands beside it."""


@dataclass(frozen=True, slots=True)
class Question:
    """Which of two answers is better, or how some are to be ranked."""

    question_id: str
    """Of the prompt, the candidates and the purpose."""
    prompt: Prompt
    candidates: tuple[Candidate, ...]
    """Two or more, in the order in which they are to be shown."""
    purpose: Purpose

    @property
    def about(self) -> About:
        """What an answer to it is about."""
        shown = tuple(c.candidate_id for c in self.candidates)
        return About(self.question_id, self.purpose, self.prompt.prompt_id, shown)


@dataclass(frozen=True, slots=True)
class About:
    """What a question is about, without the texts: enough to read an answer to it."""

    question_id: str
    purpose: Purpose
    prompt_id: str
    shown: tuple[str, ...]
    """The candidates' ids in the order shown."""

    @property
    def words(self) -> str:
        """The same as text that a labelling tool can keep beside the question."""
        return " ".join([self.purpose, self.prompt_id, *self.shown])


class People(Protocol):
    """Those who can be asked, by whatever tool."""

    def ask(self, questions: Iterable[Question]) -> None:
        """Put these questions, all that there are, to people.

        A question that was asked before is not asked again, and what was answered is kept.
        """
        ...

    def answers(self) -> Iterator[Judgment | Dropped]:
        """What people have said so far, as judgments of kind `human`, in an order of their own.

        What they said of gold questions is about people, and no judgment.
        """
        ...


def question(prompt: Prompt, candidates: Sequence[Candidate], purpose: Purpose) -> Question:
    """The question about two candidates or more; its id alone tells the order they are shown in."""
    by_id = {c.candidate_id: c for c in candidates}
    about = _identified(prompt.prompt_id, by_id, purpose)
    return Question(about.question_id, prompt, tuple(by_id[i] for i in about.shown), purpose)


def read_about(question_id: str, words: str) -> About | None:
    """What a question is about; None where the words do not fit its id, as of a mixed-up row."""
    purpose, _, ids = " ".join(words.split()).partition(" ")
    prompt_id, *shown = ids.split() or [""]
    for known in get_args(Purpose):
        about = _identified(prompt_id, shown, known)
        if purpose == known and (about.question_id, about.shown) == (question_id, tuple(shown)):
            return about
    return None


def _identified(prompt_id: str, candidate_ids: Iterable[str], purpose: Purpose) -> About:
    ids = sorted(candidate_ids)
    digits = fingerprint(["question", prompt_id, ids, purpose])
    shown = sorted(ids, key=lambda candidate_id: fingerprint([digits, candidate_id]))
    # A spreadsheet takes 12345678 or 1234e567 for a number and rounds it; a letter prevents that.
    return About(f"q{digits}", purpose, prompt_id, tuple(shown))


def human_judgment(
    about: About,
    said: Verdict | tuple[float, ...],
    annotator: str,
    words: str,
    answered_at: str | None = None,
    suggested: bool | None = None,
) -> Judgment:
    """What one annotator says of one question: a verdict on two answers, or scores of several."""
    return Judgment(
        judgment_id=fingerprint(["human", NAME, annotator, about.question_id]),
        prompt_id=about.prompt_id,
        kind="human",
        judge=NAME,
        candidate_ids=about.shown,
        verdict=None if isinstance(said, tuple) else said,
        scores=said if isinstance(said, tuple) else None,
        reply=words or None,
        annotator=annotator or None,
        answered_at=answered_at,
        suggested=suggested,
    )


def answers_on(
    groups: Iterable[Group], answers: Iterable[Judgment | Dropped]
) -> Iterator[Judgment | Dropped]:
    """The answers; those on prompts or candidates that are not among the groups are dropped."""
    known = {g.prompt.prompt_id: {c.candidate_id for c in g.candidates} for g in groups}
    for answer in answers:
        if isinstance(answer, Dropped):
            yield answer
        elif answer.prompt_id not in known:
            yield _dropped(answer.judgment_id, answer.prompt_id, "unknown_prompt", "")
        elif unknown := set(answer.candidate_ids) - known[answer.prompt_id]:
            detail = " ".join(sorted(unknown))
            yield _dropped(answer.judgment_id, answer.prompt_id, "unknown_candidate", detail)
        else:
            yield answer


LETTERS = "ABCDEF"
"""Of the answers a question shows, in their order."""
SAYS = ("verdict", "annotator", "reason")
"""What people fill in."""
VERDICTS: dict[str, Verdict] = {"a": "first", "b": "second", "tie": "tie", "both bad": "tie"}

LONGEST_CELL = 2**31 - 1
"""Characters; what `csv` takes without being told is less than what a model can write."""

Cells = dict[str, str]


@dataclass(frozen=True, slots=True)
class _Said:
    """One answered row."""

    place: str
    about: About
    said: Verdict | tuple[float, ...]
    annotator: str
    words: str


class TableOfLabels:
    """A .csv or .jsonl file of questions, a row each, that people fill in.

    `verdict` is A, B, tie or both bad (which is a tie), in any case; of three answers and more it
    is their order, as B > A = C. Empty is not yet answered. Further annotators of a question have
    rows of their own, which need its `question_id` and their name. `about` says what the question
    is about, for the program. Columns that people add are kept.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if table_suffix(self.path.name) not in (".csv", ".jsonl") or self.path.suffix == ".gz":
            raise InputError(f"{path}: no table that people fill in; name a .csv or .jsonl file")

    def ask(self, questions: Iterable[Question]) -> None:
        """Write the questions; rows that people have written in stay as they are.

        A file that already asks all this and no more is left alone: somebody may have it open.
        """
        rows = [cells for _, cells in self._rows()]
        there: dict[str, list[Cells]] = defaultdict(list)
        for cells in rows:
            there[cells["question_id"].strip()].append(cells)
        asked: list[Cells] = []
        # By the id, which is as good as a draw: who stops half-way has answered a random half.
        for one in sorted(questions, key=lambda q: q.question_id):
            asked += there.pop(one.question_id, []) or [_asking(one)]
        # What nobody asks any more is still what people said.
        left = (cells for others in there.values() for cells in others)
        asked += [cells for cells in left if any(cells[name].strip() for name in SAYS)]
        if sorted(map(_content, rows)) != sorted(map(_content, asked)):
            self._write(asked)

    def answers(self) -> Iterator[Judgment | Dropped]:
        """One judgment for each question and annotator, by prompt, however the rows are sorted.

        Dropped are rows of an unknown question, copies, and all that somebody said of a question
        if it is not the same each time. Raises InputError at a verdict that cannot be read.
        """
        said: dict[tuple[str, str], list[_Said]] = defaultdict(list)
        dropped: list[Dropped] = []
        rows = list(self._rows())
        about = {c["question_id"].strip(): c["about"] for _, c in rows if c["about"].strip()}
        for place, cells in rows:
            row = _said(place, cells, about)
            if isinstance(row, Dropped):
                dropped.append(row)
            elif row is not None:
                said[row.about.question_id, row.annotator].append(row)
        judgments: list[Judgment] = []
        for (question_id, annotator), by_one in said.items():
            first, *others = by_one
            name, prompt_id = f"{annotator or 'nobody named'}/{question_id}", first.about.prompt_id
            if first.about.purpose == "gold":
                continue
            if len({row.said for row in by_one}) == 1:
                judgments.append(human_judgment(first.about, first.said, annotator, first.words))
                dropped += [_dropped(name, prompt_id, "duplicate", row.place) for row in others]
            else:
                places = ", ".join(row.place for row in by_one)
                cure = "" if annotator else "; name the annotators if they are two"
                dropped.append(_dropped(name, prompt_id, "contradicts_itself", places + cure))
        yield from sorted(judgments, key=lambda j: (j.prompt_id, j.judgment_id))
        yield from sorted(dropped, key=lambda d: (d.prompt_id, d.record_id, d.detail))

    def _rows(self) -> Iterator[tuple[str, Cells]]:
        if not self.path.exists():
            return
        csv.field_size_limit(LONGEST_CELL)
        is_csv = self.path.suffix == ".csv"
        for place, row in read_rows(str(self.path)):
            if len(row) == 1 and is_csv:
                raise InputError(
                    f"{place}: only one column, {str(next(iter(row)))[:40]!r}; save the table with "
                    "commas between the columns"
                )
            for name in ("question_id", "about", "verdict"):
                column(row, name, place)
            texts = {name: "" if row[name] is None else str(row[name]) for name in row}
            cells = {name: "" for name in _columns(2)} | texts
            yield place, {k: _as_meant(v) for k, v in cells.items()} if is_csv else cells

    def _write(self, rows: list[Cells]) -> None:
        there = dict.fromkeys(name for cells in rows for name in cells)
        known = [n for n in _columns(len(LETTERS)) if n in there or n in _columns(2)]
        names = list(dict.fromkeys([*known, *there]))
        if self.path.suffix == ".csv":
            text = io.StringIO(newline="")
            table = csv.writer(text)
            table.writerow(names)
            table.writerows([_as_text(cells.get(name, "")) for name in names] for cells in rows)
            # Without the mark at the beginning, Excel takes UTF-8 for something else.
            content = "\ufeff" + text.getvalue()
        else:
            content = "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in rows)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with full_disk_explained(self.path, "the table is as it was"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # "replace": a model can emit half a surrogate pair, which UTF-8 does not have.
                temporary.write_bytes(content.encode("utf-8", "replace"))
                temporary.replace(self.path)
        except PermissionError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); close it elsewhere or name "
                "another file in `people.labels`"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _columns(answers: int) -> list[str]:
    """Of a table whose questions show at most so many answers."""
    shown = [f"answer_{letter.lower()}" for letter in LETTERS[:answers]]
    return ["question_id", "prompt", *shown, *SAYS, "about"]


def _asking(one: Question) -> Cells:
    names = _columns(len(one.candidates))
    answers = zip(names[2:], (c.response for c in one.candidates), strict=False)
    texts = {
        "question_id": one.question_id,
        "prompt": conversation_text(one.prompt.messages),
        **dict(answers),
        "about": one.about.words,
    }
    return {name: texts.get(name, "") for name in names}


def _said(
    place: str, cells: Mapping[str, str], abouts: Mapping[str, str]
) -> _Said | Dropped | None:
    """An answered row, or why it is none of ours; None while nobody has answered it."""
    spoken = " ".join(cells["verdict"].split())
    if not spoken:
        return None
    question_id = cells["question_id"].strip()
    words = cells["about"].strip() or abouts.get(question_id, "").strip()
    about = read_about(question_id, words)
    if about is None:
        return _dropped(f"{NAME}@{place}", "", "unknown_question", question_id[:60])
    said = _verdict(spoken, len(about.shown))
    if said is None:
        write = "A, B, tie or both bad" if len(about.shown) == 2 else "an order as B > A = C"
        raise InputError(
            f"{place}: question {question_id[:30]!r} has the verdict {spoken[:30]!r}; "
            f"write {write}, or leave it empty"
        )
    reasons = [spoken.lower()] if spoken.lower() == "both bad" else []
    reasons += [cells["reason"].strip()] if cells["reason"].strip() else []
    return _Said(place, about, said, cells["annotator"].strip(), ": ".join(reasons))


def _verdict(spoken: str, answers: int) -> Verdict | tuple[float, ...] | None:
    """What somebody wrote about so many answers; None where it cannot be read."""
    if answers == 2 and spoken.lower() in VERDICTS:
        return VERDICTS[spoken.lower()]
    labels = LETTERS[:answers]
    tiers = (tuple(labels),) if spoken.lower() == "tie" else order(spoken.upper(), labels)
    if tiers is None:
        return None
    places = {label: n for n, tier in enumerate(tiers, start=1) for label in tier}
    if answers == 2:
        return "tie" if len(tiers) == 1 else "first" if places["A"] == 1 else "second"
    return tuple(-float(places[label]) for label in labels)


def _dropped(record_id: str, prompt_id: str, reason: str, detail: str) -> Dropped:
    return Dropped("judgments", record_id, prompt_id, reason, detail)


def _content(cells: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a row says, however its columns are ordered and its lone surrogates were written."""
    return sorted((k, v.encode("utf-8", "replace").decode()) for k, v in cells.items() if v)


# A spreadsheet runs a cell that begins so as a formula. An apostrophe before it makes it text; one
# more before those that have one already, so that what was written can be read again.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")


def _as_text(cell: str) -> str:
    return f"'{cell}" if _FORMULA.match(cell) else cell


def _as_meant(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
