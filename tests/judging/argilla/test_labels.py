"""People who label in the real Argilla: what they are asked, and what of their answers arrives."""

from __future__ import annotations

import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from judging.argilla.api import Argilla, Json
from judging.argilla.labels import ArgillaPeople, _Held, _homes
from judging.argilla.layout import Kind
from judging.argilla.server import Address
from judging.people import Question
from preferences.errors import InputError
from preferences.records import Candidate, Dropped, Judgment, Message
from tests.judging.argilla.argilla_api import Client
from tests.judging.argilla.labellers import (
    Labeller,
    about_qualities,
    key_of,
    new_name,
    pair_values,
    people_at,
    planted,
    random_qualities,
    verdict_of,
)


def test_planted_pairs_come_back_with_their_sides(argilla: Address) -> None:
    rng = random.Random(1)
    asked = [about_qualities(n, random_qualities(rng, 2)) for n in range(24)]
    people = people_at(argilla, name := new_name())
    people.ask(asked)
    assert people.waiting() == 24
    labeller = Labeller(argilla)
    assert labeller.answer_all(name) == 24
    judgments = said(people)
    assert len(judgments) == len({j.judgment_id for j in judgments}) == 24
    assert {j.candidate_ids for j in judgments} == {q.about.shown for q in asked}
    for judgment in judgments:
        assert judgment.verdict == verdict_of(*planted(judgment.candidate_ids))
        assert (judgment.kind, judgment.judge, judgment.scores) == ("human", "people", None)
        assert (judgment.annotator, judgment.suggested) == (labeller.name, False)
    assert {j.verdict for j in judgments} == {"first", "second", "tie"}
    assert people.waiting() == 0
    assert said(people) == judgments


def test_planted_rankings_with_ties_come_back(argilla: Address) -> None:
    rng = random.Random(2)
    asked = [about_qualities(n, random_qualities(rng, 3 + n % 4)) for n in range(16)]
    people = people_at(argilla, name := new_name())
    people.ask(asked)
    labeller = Labeller(argilla)
    assert set(labeller.datasets(name)) == {f"{name}-ranking-{n}" for n in (3, 4, 5, 6)}
    labeller.answer_all(name)
    judgments = said(people)
    assert {j.candidate_ids for j in judgments} == {q.about.shown for q in asked}
    for judgment in judgments:
        qualities = planted(judgment.candidate_ids)
        # The best has place 1; place k has the k-th highest of the qualities that there are.
        places = sorted(set(qualities), reverse=True)
        assert judgment.scores == tuple(-(places.index(q) + 1.0) for q in qualities)
        assert judgment.verdict is None


def test_asking_again_changes_nothing(argilla: Address, owner: Client) -> None:
    asked = [about_qualities(n, [1, 2], "calibrate" if n % 2 else "ask") for n in range(20)]
    people = people_at(argilla, name := new_name())
    people.ask(asked)
    before = records(owner, name)
    assert len(before) == 20
    people.ask(reversed(asked))
    people_at(argilla, name).ask(asked)
    assert records(owner, name) == before


def test_a_question_asked_no_more_is_deleted_unless_somebody_answered_it(
    argilla: Address, owner: Client
) -> None:
    asked = [about_qualities(n, [1, 2], "calibrate") for n in range(130)]
    people = people_at(argilla, name := new_name())
    people.ask(asked)
    labeller = Labeller(argilla)
    (dataset,) = labeller.datasets(name).values()
    shown = labeller.queue(dataset)
    labeller.answer(shown[0], pair_values("a"))
    labeller.answer(shown[1], pair_values("b"), "draft")
    labeller.answer(shown[2], None, "discarded")
    kept = {record["external_id"] for record in shown[:2]}
    still = [q for q in asked if q.question_id not in kept][:30]
    people.ask(still)
    there = {r["external_id"] for r in records(owner, name)}
    assert there == kept | {q.question_id for q in still}
    assert len(said(people)) == 1
    # Of the two that were kept no more answers are awaited, though Argilla goes on showing them.
    assert people.waiting() == 30 * 3
    people.ask(asked)
    assert len(records(owner, name)) == 130
    assert people.waiting() == 130 * 3 - 1


def test_an_answer_that_comes_while_questions_are_deleted_is_kept(
    argilla: Address, owner: Client
) -> None:
    asked = [about_qualities(n, [1, 2]) for n in range(3)]
    people_at(argilla, name := new_name()).ask(asked)
    labeller = Labeller(argilla)

    class Meanwhile(Argilla):
        """Between reading what is answered and deleting the rest, somebody answers all."""

        def change(self, path: str, body: Json) -> Any:
            labeller.answer_all(name)
            return super().change(path, body)

    slow = ArgillaPeople(
        Meanwhile(argilla.url, key_of(argilla, "owner")), name, lambda ranking: "New guidelines"
    )
    slow.ask([])
    assert len(said(slow)) == len(records(owner, name)) == 3
    assert datasets(owner, name)[0]["guidelines"] == "New guidelines"


def test_calibrating_questions_want_three_answers_and_gold_is_among_both(argilla: Address) -> None:
    calibrate = [about_qualities(n, [1, 2], "calibrate") for n in range(5)]
    ask = [about_qualities(n, [1, 2]) for n in range(100, 105)]
    gold = [about_qualities(n, [1, 2], "gold") for n in range(200, 208)]
    people = people_at(argilla, name := new_name())
    people.ask([*calibrate, *ask, *gold])
    crowd = [Labeller(argilla) for _ in range(4)]
    datasets = crowd[0].datasets(name)
    assert set(datasets) == {name, f"{name}-overlap"}
    purposes = {
        dataset: Counter(purpose_of(r, [*calibrate, *ask, *gold]) for r in crowd[0].queue(id_))
        for dataset, id_ in datasets.items()
    }
    alone, together = purposes[name]["gold"], purposes[f"{name}-overlap"]["gold"]
    assert purposes[name] == {"ask": 5, "gold": alone}
    assert purposes[f"{name}-overlap"] == {"calibrate": 5, "gold": together}
    assert alone + together == 8
    assert people.waiting() == 5 + alone + 3 * (5 + together)
    answered = [labeller.answer_all(name) for labeller in crowd]
    assert answered == [10 + 8, 5 + together, 5 + together, 0]
    # What was said of gold is about people, and no judgment.
    assert len(said(people)) == 5 + 3 * 5
    assert len(people.labels().answers) == sum(answered)


def test_gold_is_spread_as_the_others_are_and_stays_where_it_was_answered() -> None:
    others = [about_qualities(n, [1, 2], "ask" if n % 4 else "calibrate") for n in range(400)]
    gold = [about_qualities(n, [1, 2], "gold") for n in range(1000, 3000)]
    asked = {q.question_id: q for q in [*others, *gold]}
    homes = _homes(asked, [], overlap=3)
    # A quarter of the others overlap. 2,000 draws with P = ¼ have the standard deviation
    # √(2,000 · ¼ · ¾) = 19.4, so that 100 are more than five of them.
    together = sum(homes[q.question_id].overlapping for q in gold)
    assert abs(together - 500) < 100
    one = gold[0].question_id
    for kind in (Kind(2, True), Kind(2, False)):
        held = _Held(kind, "", one, {}, "", known=True, kept=False, short=False)
        assert _homes(asked, [held], overlap=3)[one] == kind
    alone = {q.question_id: q for q in gold}
    assert set(_homes(alone, [], overlap=3).values()) == {Kind(2, True)}
    assert set(_homes(asked, [], overlap=1).values()) == {Kind(2, False)}


def test_more_answers_than_wanted_all_count(argilla: Address) -> None:
    people = people_at(argilla, name := new_name())
    people.ask([about_qualities(1, [1, 2])])
    crowd = [Labeller(argilla) for _ in range(3)]
    (dataset,) = crowd[0].datasets(name).values()
    opened = [labeller.queue(dataset) for labeller in crowd]  # all at the same time
    for labeller, (record,) in zip(crowd, opened, strict=True):
        labeller.answer(record, pair_values("a"))
    assert {j.annotator for j in said(people)} == {labeller.name for labeller in crowd}
    assert people.waiting() == 0


def test_drafts_and_discarded_answers_are_none_and_changed_ones_are_as_they_are_now(
    argilla: Address,
) -> None:
    people = people_at(argilla, name := new_name())
    people.ask([about_qualities(n, [1, 2]) for n in range(4)])
    labeller = Labeller(argilla)
    (dataset,) = labeller.datasets(name).values()
    draft, discarded, changed, taken_back = labeller.queue(dataset)
    labeller.answer(draft, pair_values("a"), "draft")
    labeller.answer(discarded, pair_values("a"), "discarded")
    response = labeller.answer(changed, pair_values("a"))
    (before,) = said(people)
    withdrawn = labeller.answer(taken_back, pair_values("a"))
    assert people.waiting() == 2
    labeller.change(response, pair_values("both bad", confidence="a guess", reason=" Why not? "))
    labeller.change(withdrawn, pair_values("a"), "discarded")
    (judgment,) = said(people)
    assert judgment.judgment_id == before.judgment_id
    assert (before.verdict, before.reply) == ("first", None)
    assert (judgment.verdict, judgment.reply) == ("tie", "both bad; a guess; Why not?")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", judgment.answered_at or "")
    assert str(before.answered_at) <= str(judgment.answered_at)
    assert people.waiting() == 3


def test_answers_of_a_deleted_annotator_are_gone_and_asked_for_again(
    argilla: Address, owner: Client
) -> None:
    asked = [about_qualities(n, [1, 2]) for n in range(6)]
    people = people_at(argilla, name := new_name())
    people.ask(asked)
    leaves, stays = Labeller(argilla), Labeller(argilla)
    (dataset,) = leaves.datasets(name).values()
    for record in leaves.queue(dataset)[:4]:
        leaves.answer(record, pair_values("a"))
    assert stays.answer_all(name) == 2
    owner("DELETE", f"/users/{leaves.id}")
    assert {j.annotator for j in said(people)} == {stays.name}
    assert people.waiting() == 4
    assert stays.queue(dataset) == []  # Argilla takes them for completed,
    people.ask(asked)
    assert stays.answer_all(name) == 4  # until they are counted anew.
    assert people.waiting() == 0


def test_of_two_answers_of_somebody_to_one_question_the_later_counts(
    argilla: Address, owner: Client
) -> None:
    people = people_at(argilla, name := new_name())
    twice = about_qualities(1, [1, 2], "calibrate")
    people.ask([twice, about_qualities(2, [1, 2])])
    labeller = Labeller(argilla)
    one, other = (labeller.datasets(name)[n] for n in (f"{name}-overlap", name))
    (record,) = owner("GET", f"/datasets/{one}/records")["items"]
    copy = {key: record[key] for key in ("external_id", "fields", "metadata")}
    owner("POST", f"/datasets/{other}/records/bulk", {"items": [copy]})
    (again,) = (r for r in labeller.queue(other) if r["external_id"] == twice.question_id)
    labeller.answer(again, pair_values("a"))
    labeller.answer(record, pair_values("b"))
    judgment, dropped = people.answers()
    assert isinstance(judgment, Judgment)
    assert judgment.verdict == "second"
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.record_id) == (
        "duplicate",
        f"{labeller.name}/{twice.question_id}",
    )


def test_a_record_deleted_in_argilla_is_asked_again(argilla: Address, owner: Client) -> None:
    asked = [about_qualities(n, [1, 2]) for n in range(3)]
    people = people_at(argilla, name := new_name())
    people.ask(asked)
    labeller = Labeller(argilla)
    labeller.answer_all(name)
    gone, *_ = records(owner, name)
    owner("DELETE", f"/records/{gone['id']}")
    assert len(said(people)) == 2
    people.ask(asked)
    assert people.waiting() == 1
    assert labeller.answer_all(name) == 1
    assert len(said(people)) == 3
    owner("DELETE", f"/datasets/{gone['dataset_id']}")
    assert said(people) == []
    people.ask(asked)
    assert people.waiting() == 3


def test_more_overlap_later_asks_for_more_answers(argilla: Address) -> None:
    asked = [about_qualities(1, [1, 2], "calibrate")]
    people_at(argilla, name := new_name(), overlap=2).ask(asked)
    assert people_at(argilla, name).waiting() == 2
    people = people_at(argilla, name, overlap=4)
    people.ask(asked)
    assert people.waiting() == 4
    people_at(argilla, other := new_name(), overlap=1).ask(asked)
    assert people_at(argilla, other).waiting() == 1
    assert set(Labeller(argilla).datasets(other)) == {other}


def test_annotators_see_neither_purpose_nor_category(argilla: Address, owner: Client) -> None:
    people = people_at(argilla, name := new_name())
    people.ask([about_qualities(n, [1, 2], "gold") for n in range(3)])
    labeller = Labeller(argilla)
    for dataset in labeller.datasets(name).values():
        path = f"/me/datasets/{dataset}/metadata-properties"
        assert labeller.client("GET", path)["items"] == []
        assert {p["name"] for p in owner("GET", path)["items"]} == {"purpose", "category"}
        assert [r["metadata"] for r in labeller.queue(dataset)] == [{}] * 3
    assert {r["metadata"]["purpose"] for r in records(owner, name)} == {"gold"}
    assert {r["metadata"]["category"] for r in records(owner, name)} == {"maths"}


def test_texts_that_argilla_refuses_or_runs_are_made_harmless(
    argilla: Address, owner: Client
) -> None:
    text = "half a pair \ud800, </script><script>alert(1)</script>, {{record}} \x00\x1b[31m"
    plain = about_qualities(1, [1, 2])
    prompt = replace(plain.prompt, messages=(Message("user", text),), category=text)
    hostile = replace(
        plain,
        prompt=prompt,
        candidates=tuple(replace(c, response=c.response + text) for c in plain.candidates),
    )
    people = people_at(argilla, name := new_name())
    people.ask([hostile])
    (record,) = records(owner, name)
    assert "<script" not in str(record)
    assert "</script" not in str(record)
    # What was sent is what is there, so the next time nothing is sent.
    people.ask([hostile])
    assert records(owner, name) == [record]
    assert Labeller(argilla).answer_all(name) == 1
    assert len(said(people)) == 1


def test_whoever_adds_a_suggestion_is_found_out(argilla: Address, owner: Client) -> None:
    people = people_at(argilla, name := new_name())
    people.ask([about_qualities(n, [1, 2]) for n in range(2)])
    (dataset,) = (labeller := Labeller(argilla)).datasets(name).values()
    (better,) = (
        q["id"] for q in owner("GET", f"/datasets/{dataset}/questions")["items"] if q["required"]
    )
    before, after = labeller.queue(dataset)
    suggestion = {"question_id": better, "value": "a", "type": "model"}
    owner("PUT", f"/records/{before['id']}/suggestions", suggestion)
    labeller.answer(before, pair_values("a"))
    labeller.answer(after, pair_values("a"))
    owner("PUT", f"/records/{after['id']}/suggestions", suggestion)
    suggested = {a.about.question_id: a.suggested for a in people.labels().answers}
    assert suggested == {before["external_id"]: True, after["external_id"]: False}


def test_answers_to_records_of_others_or_mixed_up_ones_are_dropped(
    argilla: Address, owner: Client
) -> None:
    people = people_at(argilla, name := new_name())
    people.ask([about_qualities(n, [1, 2]) for n in range(3)])
    fields = records(owner, name)[0]["fields"]
    one, other, _ = records(owner, name)
    for record, words in ((one, other["metadata"]["about"]), (other, None)):
        owner("PATCH", f"/records/{record['id']}", {"metadata": {"about": words}})
    path = f"/datasets/{one['dataset_id']}/records/bulk"
    owner("POST", path, {"items": [{"fields": fields}, {"fields": fields, "external_id": "q1"}]})
    labeller = Labeller(argilla)
    assert labeller.answer_all(name) == 5
    found = list(people.answers())
    assert len([a for a in found if isinstance(a, Judgment)]) == 1
    reasons = Counter((a.reason, a.detail) for a in found if isinstance(a, Dropped))
    assert reasons == {
        ("unknown_question", identity): 1
        for identity in (one["external_id"], other["external_id"], "None", "q1")
    }
    # Whatever was shown to those who answered, the next time it asks it leaves that alone.
    people.ask([about_qualities(n, [1, 2]) for n in range(3)])
    assert list(people.answers()) == found
    assert len(records(owner, name)) == 5


def test_what_was_mixed_up_before_anybody_answered_is_put_right(
    argilla: Address, owner: Client
) -> None:
    asked = [about_qualities(n, [1, 2]) for n in range(2)]
    people = people_at(argilla, name := new_name())
    people.ask(asked)
    before = [(r["external_id"], r["fields"], r["metadata"]) for r in records(owner, name)]
    one, other = records(owner, name)
    for record, of_which in ((one, other), (other, one)):
        mixed_up = {key: of_which[key] for key in ("fields", "metadata")}
        owner("PATCH", f"/records/{record['id']}", mixed_up)
    people.ask(asked)
    assert [(r["external_id"], r["fields"], r["metadata"]) for r in records(owner, name)] == before


def test_a_dataset_of_somebody_else_keeps_its_name(argilla: Address, owner: Client) -> None:
    (workspace,) = owner("GET", "/me/workspaces")["items"]
    name = new_name()
    taken = owner("POST", "/datasets", {"name": name, "workspace_id": workspace["id"]})
    people = people_at(argilla, name)
    assert said(people) == []
    assert people.waiting() == 0
    with pytest.raises(InputError, match=rf"dataset '{name}' .* rename it"):
        people.ask([about_qualities(1, [1, 2])])
    assert owner("GET", f"/datasets/{taken['id']}/fields")["items"] == []


def test_a_half_made_dataset_is_completed(argilla: Address, owner: Client) -> None:
    people = people_at(argilla, whole := new_name())
    people.ask([about_qualities(1, [1, 2])])
    (made,) = datasets(owner, whole)
    (workspace,) = owner("GET", "/me/workspaces")["items"]
    mark = made["metadata"]["pairwright"]
    name = new_name()
    half = {"name": name, "metadata": {"pairwright": {**mark, "recipe": name}}}
    half_made = owner("POST", "/datasets", {**half, "workspace_id": workspace["id"]})
    field, *_ = owner("GET", f"/datasets/{made['id']}/fields")["items"]
    wanted = {key: field[key] for key in ("name", "title", "required", "settings")}
    owner("POST", f"/datasets/{half_made['id']}/fields", wanted)
    people = people_at(argilla, name)
    assert people.waiting() == 0
    people.ask([about_qualities(1, [1, 2], "calibrate"), about_qualities(2, [1, 2])])
    assert people.waiting() == 4
    (completed, _) = datasets(owner, name)
    for part in ("fields", "questions"):
        shown = [
            [{**thing, "id": "", "dataset_id": "", "inserted_at": "", "updated_at": ""}
             for thing in owner("GET", f"/datasets/{dataset['id']}/{part}")["items"]]
            for dataset in (made, completed)
        ]  # fmt: skip
        assert shown[0] == shown[1]


def test_two_pushes_at_once_ask_everything_once(argilla: Address, owner: Client) -> None:
    asked = [about_qualities(n, [1, 2]) for n in range(30)]
    name = new_name()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda people: people.ask(asked), [people_at(argilla, name)] * 4))
    assert len(datasets(owner, name)) == 1
    assert sorted(r["external_id"] for r in records(owner, name)) == sorted(
        q.question_id for q in asked
    )
    people_at(argilla, name).ask(asked)
    assert Labeller(argilla).answer_all(name) == 30


def test_very_long_answers_are_put_in_smaller_parts(argilla: Address, owner: Client) -> None:
    long = [about_qualities(n, [1, 2]) for n in range(4)]
    asked = [
        replace(q, candidates=tuple(lengthened(c, 500_000) for c in q.candidates)) for q in long
    ]
    people = people_at(argilla, name := new_name())
    people.ask(asked)
    found = records(owner, name)
    assert len(found) == 4
    assert all(len(str(record["fields"])) > 1_000_000 for record in found)


def lengthened(candidate: Candidate, characters: int) -> Candidate:
    return replace(candidate, response=candidate.response + "\n\n" + "word " * (characters // 5))


def said(people: ArgillaPeople) -> list[Judgment]:
    """All judgments; nothing may be dropped."""
    found = list(people.answers())
    assert [a for a in found if isinstance(a, Dropped)] == []
    return [a for a in found if isinstance(a, Judgment)]


def datasets(owner: Client, recipe: str) -> list[dict[str, object]]:
    found = owner("GET", "/me/datasets")["items"]
    return [d for d in found if str(d["name"]).startswith(recipe)]


def records(owner: Client, recipe: str) -> list[dict[str, object]]:
    found = []
    for dataset in datasets(owner, recipe):
        found += owner("GET", f"/datasets/{dataset['id']}/records", limit=1000)["items"]
    return found


def purpose_of(record: dict[str, object], asked: list[Question]) -> str:
    (found,) = (q for q in asked if q.question_id == record["external_id"])
    return found.purpose
