"""People who label in Argilla.

A question is a record whose external id is the question's. What it is about lies in the record
itself, so an answer can be read after the store has moved on. Records never carry suggestions:
people are asked exactly where judges do not know, and a suggestion that is left untouched is
submitted as an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from judging.argilla import page
from judging.argilla.api import Argilla, Json
from judging.argilla.layout import (
    BETTER,
    CATEGORY,
    CONFIDENCE,
    ORDER,
    PURPOSE,
    REASON,
    Dataset,
    Kind,
    datasets_of,
    make_dataset,
    make_workspace,
    usernames,
    workspace_of,
)
from judging.people import LETTERS, VERDICTS, About, Question, human_judgment, read_about
from preferences.fingerprint import fingerprint
from preferences.records import Dropped, Judgment, Verdict

ABOUT, WITHDRAWN = "about", "withdrawn"
"""Further metadata of a record, for the program."""

RECORDS_AT_ONCE, CHARACTERS_AT_ONCE = 100, 2_000_000
"""Of what is put in one request, unless a record alone is more."""
DELETED_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Answer:
    """What one person said of one question, gold or not."""

    about: About
    said: Verdict | tuple[float, ...]
    annotator: str
    words: str
    at: datetime
    """When it was given or last changed, in UTC."""
    suggested: bool

    @property
    def judgment(self) -> Judgment:
        """The same as a judgment, which an answer to a gold question is not."""
        at = self.at.strftime("%Y-%m-%dT%H:%M:%SZ")
        return human_judgment(self.about, self.said, self.annotator, self.words, at, self.suggested)


@dataclass(frozen=True, slots=True)
class Labels:
    """All that people have said so far."""

    answers: tuple[Answer, ...]
    """At most one of each person to each question, by prompt."""
    dropped: tuple[Dropped, ...]
    waiting: int
    """Answers still wanted of the questions that are asked."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A record that is there, without its texts."""

    kind: Kind
    record_id: str
    question_id: str
    metadata: Json
    content: str
    """A hash of what is shown."""
    known: bool
    """Whether it says what it is about, and that fits its id."""
    kept: bool
    """Whether somebody has answered, be it as a draft."""
    short: bool
    """Whether Argilla calls it completed and answers are missing: their author was deleted."""


class ArgillaPeople:
    """Meets `People`. Datasets are named after the recipe and lie in the workspace `pairwright`."""

    def __init__(
        self, api: Argilla, name: str, guidelines: Callable[[bool], str], overlap: int = 3
    ) -> None:
        """`name` is the recipe's; so many people as `overlap` answer each calibrating question."""
        self._api = api
        self._name = name
        self._guidelines = guidelines
        self._overlap = overlap

    def ask(self, questions: Iterable[Question]) -> None:
        """Put these questions, all that there are, to people.

        What somebody has answered stays, as it was shown. Unanswered questions that are asked no
        more are deleted. After an interruption the next time does what is missing. Raises
        InputError if a dataset's name is taken by one that is not the recipe's.
        """
        asked = {one.question_id: one for one in questions}
        workspace = make_workspace(self._api)
        datasets = {d.kind: d for d in datasets_of(self._api, workspace, self._name)}
        held = [h for dataset in datasets.values() for h in self._held(dataset)]
        homes = _homes(asked, held, self._overlap)
        for kind in sorted({*datasets, *homes.values()}):
            people = self._overlap if kind.overlapping else 1
            dataset_id = make_dataset(
                self._api, workspace, self._name, kind, people, self._guidelines(kind.answers > 2)
            )
            here = {h.question_id: h for h in held if h.kind == kind}
            # By the id, which is as good as a draw.
            wanted = sorted(question_id for question_id, home in homes.items() if home == kind)
            others = [h for question_id, h in here.items() if homes.get(question_id) != kind]
            self._put(dataset_id, (_item(asked[q], here.get(q)) for q in wanted))
            self._put(dataset_id, (_withdrawn(h) for h in others if h.kept))
            self._delete(dataset_id, {h.record_id for h in others if not h.kept})

    def answers(self) -> Iterator[Judgment | Dropped]:
        """One judgment for each question and person, by prompt; answers to gold are none.

        Over-collected answers count as well; drafts and discarded ones are no answers.
        """
        labels = self.labels()
        judgments = [a.judgment for a in labels.answers if a.about.purpose != "gold"]
        yield from sorted(judgments, key=lambda j: (j.prompt_id, j.judgment_id))
        yield from labels.dropped

    def waiting(self) -> int:
        """How many answers are still wanted of the questions that were asked."""
        return self.labels().waiting

    def labels(self) -> Labels:
        """All that people have said, of gold questions too, and how much is missing."""
        workspace = workspace_of(self._api)
        if workspace is None:
            return Labels((), (), 0)
        said: list[Answer] = []
        dropped: list[Dropped] = []
        waiting = 0
        for dataset in datasets_of(self._api, workspace, self._name):
            for record in self._api.records(dataset.id):
                about = _about(record)
                given = _submitted(record)
                if about and WITHDRAWN not in record["metadata"]:
                    waiting += max(dataset.people - len(given), 0)
                for response in given:
                    answer = _answer(about, record, response)
                    if isinstance(answer, Dropped):
                        dropped.append(answer)
                    else:
                        said.append(answer)
        # Read last, so that whoever has answered is among them.
        names = usernames(self._api, workspace)
        last: dict[tuple[str, str], Answer] = {}
        for answer in sorted(said, key=lambda a: a.at):
            named = replace(answer, annotator=names.get(answer.annotator, answer.annotator))
            key = named.about.question_id, named.annotator
            if (earlier := last.get(key)) is not None:
                name = f"{named.annotator}/{named.about.question_id}"
                detail = f"answered again after {earlier.at:%Y-%m-%d %H:%M}"
                dropped.append(_dropped(name, named.about.prompt_id, "duplicate", detail))
            last[key] = named
        answers = sorted(
            last.values(), key=lambda a: (a.about.prompt_id, a.about.question_id, a.annotator)
        )
        dropped.sort(key=lambda d: (d.prompt_id, d.record_id, d.detail))
        return Labels(tuple(answers), tuple(dropped), waiting)

    def _held(self, dataset: Dataset) -> Iterator[_Held]:
        for record in self._api.records(dataset.id):
            about, kept = _about(record), _kept(record)
            # What does not fit its id is made anew, unless somebody has answered whatever it is.
            if about is not None or kept:
                completed = record["status"] == "completed"
                yield _Held(
                    kind=dataset.kind,
                    record_id=record["id"],
                    question_id=record["external_id"] or "",
                    metadata=record["metadata"] or {},
                    content=fingerprint(record["fields"]),
                    known=about is not None,
                    kept=kept,
                    short=completed and len(_submitted(record)) < dataset.people,
                )

    def _put(self, dataset_id: str, items: Iterable[Json | None]) -> None:
        for batch in _batches(item for item in items if item is not None):
            self._api.put(f"/datasets/{dataset_id}/records/bulk", {"items": batch})

    def _delete(self, dataset_id: str, record_ids: Collection[str]) -> None:
        offset, total = 0, len(record_ids)
        while offset < total:
            # Read once more right before, because people go on answering.
            records, total = self._api.page(dataset_id, offset, DELETED_AT_ONCE)
            gone = [r["id"] for r in records if r["id"] in record_ids and not _kept(r)]
            if gone:
                self._api.delete(f"/datasets/{dataset_id}/records", ids=",".join(gone))
            offset += DELETED_AT_ONCE - len(gone)


def _homes(asked: Mapping[str, Question], held: Iterable[_Held], overlap: int) -> dict[str, Kind]:
    """In which dataset each question is asked.

    One that was answered stays where it is. Gold questions are spread over the datasets of both
    overlaps, as others are, so that all people meet them among others: of two datasets somebody may
    only ever open one. A gold question is in one of them alone, for nobody ought to see it twice.
    """
    stays = {h.question_id: h.kind for h in held if h.kept}
    homes = {
        q: stays.get(q) or Kind(len(one.candidates), one.purpose == "calibrate" and overlap > 1)
        for q, one in asked.items()
        if one.purpose != "gold"
    }
    others = Counter(homes.values())
    there = {h.question_id: h.kind for h in held} | stays
    for q, one in asked.items():
        if one.purpose == "gold":
            alone, together = (Kind(len(one.candidates), several) for several in (False, True))
            of_both = others[alone] + others[together]
            share = others[together] / of_both if of_both else float(overlap > 1)
            homes[q] = there.get(q) or (together if _draw(q) < share else alone)
    return homes


def _draw(question_id: str) -> float:
    """In [0, 1), by the question alone."""
    return int(fingerprint(["gold among others", question_id])[:8], 16) / 16**8


def _item(question: Question, held: _Held | None) -> Json | None:
    """What has to be put so that the question is asked as it should be; None if it is."""
    texts = {page.FIELD: page.content(question)}
    metadata: Json = {ABOUT: question.about.words, PURPOSE: question.purpose}
    if question.prompt.category is not None:
        metadata[CATEGORY] = page.neutral(question.prompt.category)
    item: Json = {"external_id": question.question_id, "metadata": metadata}
    if held is None:
        return {**item, "fields": texts}
    if not held.kept and held.content != fingerprint(texts):
        return {**item, "fields": texts}
    if not held.known:
        return None
    # What is put is counted anew, and shown again if answers are missing.
    return item if held.short or held.metadata != metadata else None


def _withdrawn(held: _Held) -> Json | None:
    if WITHDRAWN in held.metadata or not held.known:
        return None
    return {"external_id": held.question_id, "metadata": {**held.metadata, WITHDRAWN: True}}


def _batches(items: Iterable[Json]) -> Iterator[list[Json]]:
    batch: list[Json] = []
    characters = 0
    for item in items:
        length = len(str(item))
        if len(batch) == RECORDS_AT_ONCE or (batch and characters + length > CHARACTERS_AT_ONCE):
            yield batch
            batch, characters = [], 0
        batch.append(item)
        characters += length
    if batch:
        yield batch


def _about(record: Json) -> About | None:
    """None if the record is none of ours, or what it says does not fit its id."""
    words = (record["metadata"] or {}).get(ABOUT)
    question_id = record["external_id"]
    if isinstance(words, str) and isinstance(question_id, str):
        return read_about(question_id, words)
    return None


def _kept(record: Json) -> bool:
    return any(r["status"] in ("submitted", "draft") for r in record["responses"])


def _submitted(record: Json) -> list[Json]:
    return [r for r in record["responses"] if r["status"] == "submitted"]


def _answer(about: About | None, record: Json, response: Json) -> Answer | Dropped:
    """With the annotator's id for the name."""
    if about is None:
        detail = str(record["external_id"])[:60]
        return _dropped(response["id"], "", "unknown_question", detail)
    values = {name: given.get("value") for name, given in (response["values"] or {}).items()}
    said = _said(values, len(about.shown))
    if said is None:
        detail = ascii(values.get(ORDER, values.get(BETTER)))[:60]
        return _dropped(response["id"], about.prompt_id, "unreadable_answer", detail)
    bad = "both bad" if values.get(BETTER) == "both bad" else None
    parts = (bad, values.get(CONFIDENCE), values.get(REASON))
    spoken = (str(part).strip() for part in parts if part)
    at = _time(response["updated_at"])
    return Answer(
        about=about,
        said=said,
        annotator=response["user_id"],
        words="; ".join(words for words in spoken if words),
        at=at,
        suggested=any(_time(s["inserted_at"]) <= at for s in record["suggestions"]),
    )


def _said(values: Mapping[str, Any], answers: int) -> Verdict | tuple[float, ...] | None:
    """None where it cannot be read."""
    if answers == 2:
        better = values.get(BETTER)
        return VERDICTS.get(better) if isinstance(better, str) else None
    # By their ranks: the list is in the order of the options, whatever was said.
    order = values.get(ORDER)
    ranks = {o.get("value"): o.get("rank") for o in order} if isinstance(order, list) else {}
    if {*ranks} != {*LETTERS[:answers]} or not all(isinstance(r, int) for r in ranks.values()):
        return None
    # A place that nobody took, as in 1, 3, means no more than the next.
    places = sorted(set(ranks.values()))
    return tuple(-float(places.index(ranks[label]) + 1) for label in LETTERS[:answers])


def _time(said: str) -> datetime:
    time = datetime.fromisoformat(said)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _dropped(record_id: str, prompt_id: str, reason: str, detail: str) -> Dropped:
    return Dropped("judgments", record_id, prompt_id, reason, detail)
