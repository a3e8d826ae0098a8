"""A build that asks people: its questions, their answers, and what becomes of the dataset."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from flows import labelling, labels, stages
from flows.build import _make_all
from flows.progress import Progress
from flows.recipe import load_recipe
from flows.report import report_tables
from flows.run import Run
from judging.people import question
from preferences.errors import InputError
from preferences.records import Candidate, Dropped, Judgment, Preference, Route
from tests.flows.asking import Models, parts, prepared, serving, write_recipe
from tests.judging.groups import group

PROMPTS = 60
BUDGET = 40
PEOPLE = {
    "labels": "labels.csv",
    "budget": BUDGET,
    "calibration": 0.75,
    "target_agreement": 0.6,
    "keep": 0.999,
}
TEXTS = (" and rain in the west", ": bread with salt", " because nobody knew")
Said = Callable[[dict[str, str]], dict[str, str]]


@dataclass
class World:
    """A folder with a recipe that asks people."""

    folder: Path

    @property
    def table(self) -> Path:
        return self.folder / "labels.csv"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def build(self, store: str = "store") -> Run:
        """Build the dataset, as far as it is owed."""
        run = prepared(self.recipe, self.folder / store)
        run.progress = Progress("people")
        if run.store.manifest(run.plan.dataset) is None:
            _make_all(run, self.recipe.read_text())
        return run

    def rows(self) -> list[dict[str, str]]:
        with self.table.open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream))

    def fill(self, said: Said, count: int | None = None) -> None:
        """Have somebody answer the first questions of the table, or all."""
        rows = self.rows()
        for row in rows[:count]:
            row.update(said(row))
        with self.table.open("w", encoding="utf-8-sig", newline="") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    def change(self, **people: Any) -> None:
        """Change what the recipe says of people."""
        values = yaml.safe_load(self.recipe.read_text())
        values["people"] |= people
        self.recipe.write_text(yaml.safe_dump(values))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Sixty prompts with three answers each; the judge prefers what comes first as a text."""
    answers, verdicts = [], []
    for n in range(PROMPTS):
        models = [f"{(n + k) % 3}" for k in range(3)]
        for model in models:
            text = f"{model}{TEXTS[int(model)]} {n}"
            answers.append({"prompt": f"question {n}", "model": model, "response": text})
        for first, second in permutations(models, 2):
            # Surer or less so from prompt to prompt: 0.55 to 0.84.
            sure = 0.55 + n / 200
            shown = {"prompt": f"question {n}", "first": first, "second": second}
            verdicts.append({**shown, "probability": sure if first < second else 1 - sure})
    for name, rows in (("answers", answers), ("verdicts", verdicts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    imported = {"kind": "import", "name": "answers", "source": "answers.jsonl"}
    judge = {"kind": "import", "name": "judge", "source": "verdicts.jsonl"}
    recipe = {
        "name": "asking",
        "candidates": [imported],
        "judges": [{**judge, "verdict_in": "probability"}],
        "people": PEOPLE,
        "pairs": {"min_probability": 0.5},
        "split": {"test": 0.3},
        "runtime": {"shard_size": 20},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return World(tmp_path)


def first_text(row: dict[str, str]) -> dict[str, str]:
    """Somebody who thinks as the judge does."""
    return {"verdict": "A" if row["answer_a"] < row["answer_b"] else "B", "annotator": "ann"}


def last_text(row: dict[str, str]) -> dict[str, str]:
    """Somebody who thinks the opposite."""
    return {"verdict": "B" if row["answer_a"] < row["answer_b"] else "a", "annotator": "bob"}


def routes_of(run: Run) -> dict[str, Route]:
    assert run.plan.routes is not None
    return {r.prompt_id: r for r in run.store.read(run.plan.routes, Route)}


def summary_of(run: Run) -> dict[str, Any]:
    manifest = run.store.manifest(run.plan.routes) if run.plan.routes else None
    assert manifest is not None
    return manifest.summary


def printed(world: World) -> str:
    console = Console(width=300, file=io.StringIO(), record=True)
    for part in report_tables(world.recipe, {}, str(world.folder / "store"), dataset_only=True):
        console.print(part)
    return console.export_text()


def test_a_build_asks_and_goes_on_without_answers(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.build()
    assert run.store.manifest(run.plan.dataset) is not None
    rows = world.rows()
    assert len(rows) == BUDGET
    assert all(row["verdict"] == "" and row["answer_a"][0] in "012" for row in rows)
    # 0.75 · 40 at random; no P is so high as 0.999, so the rest is asked by worth.
    assert Counter(r.decision for r in routes_of(run).values()) == {
        "calibrate": 30,
        "ask": 10,
        "over_budget": 20,
    }
    said = capsys.readouterr()
    line = f"people: 0 of 40 answers are in {world.table}; fill in its `verdict` and run"
    assert line in " ".join((said.err + said.out).split())
    report = " ".join(printed(world).split())
    assert "0 of 40 answers" in report
    assert "The threshold is the recipe's and not shown by people: 0 answers" in report


def test_the_questions_are_about_the_pairs_of_the_routes(world: World) -> None:
    run = world.build()
    routes = routes_of(run)
    groups = {c.candidate_id: c for a in run.plan.candidates for c in run.store.read(a, Candidate)}
    for row in world.rows():
        purpose, prompt_id, first, second = row["about"].split()
        route = routes[prompt_id]
        assert purpose == route.decision
        assert {first, second} == {route.first_id, route.second_id}
        assert (row["answer_a"], row["answer_b"]) == (
            groups[first].response,
            groups[second].response,
        )


def test_answers_make_a_new_dataset_without_another_call(tmp_path: Path) -> None:
    models, world = Models(), World(tmp_path)
    with serving(models) as endpoint:
        write_recipe(tmp_path, endpoint.url, 24, people=PEOPLE | {"budget": 16})
        old = world.build()
        before, table = parts(tmp_path / "store"), world.table.read_bytes()
        # Again, and elsewhere from nothing, it is the same.
        assert world.build().plan == old.plan
        assert world.table.read_bytes() == table
        world.table.unlink()
        assert world.build("another").plan == old.plan
        assert parts(tmp_path / "another") == before
        assert world.table.read_bytes() == table
        asked = sum(models.answered.values())

        world.fill(last_text, 10)
        new = world.build()
        assert sum(models.answered.values()) == asked
    assert new.plan.dataset != old.plan.dataset
    assert new.plan.judgments == old.plan.judgments
    assert new.plan.answers is not None
    answers = list(new.store.read(new.plan.answers, Judgment))
    assert len(answers) == 10
    assert {(j.kind, j.judge, j.annotator) for j in answers} == {("human", "people", "bob")}
    # Who was asked and has answered is asked still, and so are those who have not.
    assert (summary_of(new)["questions"], summary_of(new)["answered"]) == (16, 10)
    decisions = {p: r.decision for p, r in routes_of(new).items()}
    assert {decisions[j.prompt_id] for j in answers} <= {"calibrate", "ask"}
    assert len(world.rows()) == 16


def test_people_decide_where_they_and_the_judge_differ(world: World) -> None:
    old = world.build()
    world.fill(last_text)
    new = world.build()
    before = {p.prompt_id: p for p in old.store.read(old.plan.preferences, Preference)}
    after = {p.prompt_id: p for p in new.store.read(new.plan.preferences, Preference)}
    assert new.plan.answers is not None
    asked = {j.prompt_id for j in new.store.read(new.plan.answers, Judgment)}
    assert len(asked) == BUDGET
    for prompt_id in asked & before.keys() & after.keys():
        was, now = before[prompt_id], after[prompt_id]
        pair = (was.chosen_id, was.rejected_id)
        # Whatever is paired now, the old pair is less sure than it was.
        assert (now.chosen_id, now.rejected_id) != pair or now.probability < was.probability
    # People never agree, so nobody is kept on the judge's word, and that is said.
    assert summary_of(new)["trust"]["threshold"] is None
    assert summary_of(new)["decisions"].get("keep", 0) == 0
    assert "No prompt is kept on the judges' word alone: people agree" in printed(world)


def test_people_who_agree_show_from_where_judges_can_be_trusted(world: World) -> None:
    world.build()
    world.fill(first_text)
    new = world.build()
    trust = summary_of(new)["trust"]
    # 30 on the random slice, all agree: 0.6^6 = 0.047, so 18 labels or 60 % are tested first, and
    # P(Bin(30, 0.6) ≥ 30) = 2e-7 passes at last. All prompts are as sure as the least sure.
    least = min(r.confidence for r in routes_of(new).values())
    assert (trust["tested"], trust["labels"], trust["agreed"]) == (True, 30, 30)
    assert trust["threshold"] == pytest.approx(least)
    assert summary_of(new)["decisions"] == {"ask": 10, "calibrate": 30, "keep": 20}
    card = new.store.read_text(f"{new.store.folder(new.plan.dataset)}/README.md") or ""
    assert "| people agree with the judges, random slice | 30 of 30 |" in card
    assert "| agreement wanted where judges are trusted alone | 60% |" in card
    assert "| kept on the judges' word alone | 20 (33.3%) |" in card
    report = " ".join(printed(world).split())
    assert f"all 40 answers are in {world.table}" in report
    assert f"P ≥ {least:.3f}" in report
    # The annotator is a rater among the others.
    assert "people/ann" in report


def test_enough_answers_calibrate_the_judge(world: World) -> None:
    world.change(budget=PROMPTS)
    world.build()
    world.fill(first_text)
    run = world.build()
    manifest = run.store.manifest(run.plan.rankings)
    assert manifest is not None
    assert manifest.summary["calibration"]["labels"] == PROMPTS
    # What the judges said stays in each ranking beside what people said.
    assert manifest.summary["uncalibrated"] is None


def test_a_larger_budget_keeps_answers_and_asks_for_more(world: World) -> None:
    world.change(target_agreement=0.999)  # So that there is something left to ask.
    world.build()
    world.fill(first_text)
    before = world.build()
    old = {row["question_id"]: row["verdict"] for row in world.rows()}
    world.change(budget=50)
    run = world.build()
    rows = {row["question_id"]: row for row in world.rows()}
    assert len(old) == BUDGET
    assert all(rows[name]["verdict"] == verdict for name, verdict in old.items())
    assert summary_of(run)["questions"] == 50
    assert run.plan.dataset != before.plan.dataset
    assert run.plan.answers == before.plan.answers


def test_answers_change_no_question(world: World) -> None:
    old = routes_of(world.build())
    world.fill(last_text)
    new = routes_of(world.build())
    for prompt_id, route in new.items():
        was = old[prompt_id]
        assert (route.confidence, route.regret) == (was.confidence, was.regret)
        if route.decision == was.decision:
            assert (route.first_id, route.second_id) == (was.first_id, was.second_id)


def test_a_new_judge_is_measured_anew_and_what_was_answered_by_worth_is_enough(
    world: World,
) -> None:
    world.change(target_agreement=0.999)
    world.build()
    world.fill(first_text)
    # A copy of each question waits for somebody else.
    rows = world.rows()
    said = dict.fromkeys(("verdict", "annotator"), "")
    copies = iter([*rows, *({**row, **said} for row in rows)])
    with world.table.open("w", encoding="utf-8-sig", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(copies)
    world.build()
    assert len(world.rows()) == 2 * BUDGET
    # Now the judge says the opposite; best and worst change places, and other rivals appear.
    path = world.folder / "verdicts.jsonl"
    verdicts = [json.loads(line) for line in path.read_text().splitlines()]
    for row in verdicts:
        lead = row["probability"] - 0.5
        row["probability"] = 0.5 + (0.1 if "1" in (row["first"], row["second"]) else -1) * lead
    path.write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    run = world.build()
    answered = {row["about"].split()[1] for row in rows}
    open_rows = [row for row in world.rows() if not row["verdict"]]
    fresh = {row["question_id"] for row in open_rows} - {row["question_id"] for row in rows}
    routes = routes_of(run)
    asked_anew = {row["about"].split()[1] for row in open_rows if row["question_id"] in fresh}
    assert {routes[p].decision for p in asked_anew & answered} <= {"calibrate"}
    assert sum(row["verdict"] != "" for row in world.rows()) == BUDGET  # Nothing is lost.


def test_answers_that_fit_nothing_are_dropped_with_reasons(world: World) -> None:
    world.build()
    world.fill(first_text)
    rows = world.rows()
    of = group("a", "b", question="of another recipe")
    elsewhere = question(of.prompt, of.candidates, "ask")
    rows[0]["question_id"] = "q0"
    rows[1] |= {"question_id": elsewhere.question_id, "about": elsewhere.about.words}
    answered = iter(rows)
    world.fill(lambda row: next(answered))
    run = world.build()
    assert run.plan.answers is not None
    reasons = Counter(d.reason for d in run.store.read(run.plan.answers, Dropped, kind="dropped"))
    assert reasons == {"unknown_question": 1, "unknown_prompt": 1}
    assert run.store.count(run.plan.answers) == BUDGET - 2


def test_shards_change_nothing_of_what_people_are_asked(world: World, tmp_path: Path) -> None:
    one = world.build()
    rows = world.rows()
    world.table.unlink()
    values = yaml.safe_load(world.recipe.read_text())
    values["runtime"]["shard_size"] = 1000
    world.recipe.write_text(yaml.safe_dump(values))
    other = world.build("whole")
    assert len(other.shards) < len(one.shards)
    assert routes_of(other) == routes_of(one)
    assert world.rows() == rows


def test_what_people_write_during_a_build_counts_in_the_next(world: World) -> None:
    world.build()
    world.fill(first_text, 5)
    run = prepared(world.recipe, world.folder / "store")
    world.fill(last_text)
    _make_all(run, world.recipe.read_text())
    assert run.plan.answers is not None
    assert run.store.count(run.plan.answers) == 5
    assert all(row["annotator"] == "bob" for row in world.rows())  # Nothing is written over.
    assert summary_of(world.build())["answered"] == BUDGET


def test_a_lost_table_is_written_again(world: World) -> None:
    run = world.build()
    table = world.table.read_bytes()
    world.table.unlink()
    stages.ask_people(run)
    assert world.table.read_bytes() == table


def test_an_unreadable_verdict_stops_the_build_before_it_starts(world: World) -> None:
    world.build()
    world.fill(lambda row: {"verdict": "the first"}, 1)
    with pytest.raises(
        InputError, match=r"labels\.csv:2: question 'q\w+' has the verdict 'the fir"
    ):
        world.build()


def test_the_recipe_names_its_table_relative_to_itself(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    people = load_recipe(world.recipe).people
    assert people is not None
    assert people.labels == str(world.table)
    world.change(labels=str(tmp_path / "labels.jsonl"))
    people = load_recipe(world.recipe).people
    assert people is not None
    assert people.labels == str(tmp_path / "labels.jsonl")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"budget": 0}, "people.budget: 0: input should be greater than or equal to 1"),
        ({"labels": "labels.xlsx"}, "name a .csv or .jsonl file"),
        ({"badget": 3}, "people.badget: unknown key; did you mean 'budget'?"),
    ],
)
def test_a_wrong_word_about_people_is_named(
    world: World, change: dict[str, Any], complaint: str
) -> None:
    world.change(**change)
    with pytest.raises(InputError, match=re.escape(complaint)):
        world.build()


def test_no_judge_is_called_people_where_people_are_asked(world: World) -> None:
    values = yaml.safe_load(world.recipe.read_text())
    values["judges"][0]["name"] = "people"
    world.recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match="none can be named 'people'; rename it"):
        load_recipe(world.recipe)


def test_a_dataset_can_wait_for_people(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.change(wait_days=2)
    run = world.build()
    assert run.store.manifest(run.plan.dataset) is None
    assert run.store.manifest(run.plan.rankings) is None
    assert "0 of 40 answers" in (said := " ".join(capsys.readouterr().err.split()))
    assert "the dataset waits until" in said
    world.fill(first_text, BUDGET - 1)
    run = world.build()
    assert run.store.manifest(run.plan.dataset) is None
    world.fill(first_text)
    run = world.build()
    assert run.store.manifest(run.plan.dataset) is not None


def test_the_wait_ends_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.change(wait_days=2)
    run = world.build()
    since = labels.asked_before(run.plan.recipe, run.store)
    assert since is not None
    for hours, is_made in ((47, False), (49, True)):
        later = since.since + timedelta(hours=hours)
        monkeypatch.setattr(labels, "now", lambda later=later: later)
        run = world.build()  # Which does not begin the wait anew.
        assert (run.store.manifest(run.plan.dataset) is not None) == is_made
    # Nor does the dataset wait again for who answers later than that.
    world.fill(first_text, 1)
    late = world.build()
    assert late.plan.dataset != run.plan.dataset
    assert late.store.manifest(late.plan.dataset) is not None


def test_people_put_three_answers_in_order(world: World) -> None:
    world.change(answers=3, budget=20)
    world.build()
    rows = world.rows()
    # All three have the same three authors, whose texts begin with their numbers.
    assert all(sorted(row[f"answer_{x}"][0] for x in "abc") == ["0", "1", "2"] for row in rows)

    def by_number(row: dict[str, str]) -> dict[str, str]:
        letters = sorted("abc", key=lambda x: row[f"answer_{x}"][0], reverse=True)
        return {"verdict": f"{letters[0]} > {letters[1]} = {letters[2]}".upper()}

    world.fill(by_number)
    run = world.build()
    assert run.plan.answers is not None
    texts = {
        c.candidate_id: c.response
        for a in run.plan.candidates
        for c in run.store.read(a, Candidate)
    }
    said = list(run.store.read(run.plan.answers, Judgment))
    assert len(said) == 20
    for judgment in said:
        found = {
            texts[i][0]: s
            for i, s in zip(judgment.candidate_ids, judgment.scores or (), strict=True)
        }
        assert found == {"2": -1, "1": -2, "0": -2}


def test_gold_questions_are_asked_and_are_no_judgments(world: World) -> None:
    gold = [{"prompt": f"gold {n}", "chosen": "right", "rejected": "wrong"} for n in range(5)]
    (world.folder / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gold))
    world.change(gold="gold.jsonl", wait_days=2)
    world.build()
    assert len(world.rows()) == BUDGET + 5
    assert (
        sum({row["answer_a"], row["answer_b"]} == {"right", "wrong"} for row in world.rows()) == 5
    )
    world.fill(lambda row: {} if "right" in row.values() else first_text(row))
    run = world.build()  # Which does not wait for gold.
    assert run.store.manifest(run.plan.dataset) is not None
    world.fill(first_text)
    after = world.build()
    assert after.plan.dataset == run.plan.dataset
    assert len(world.rows()) == BUDGET + 5


def test_answers_come_in_through_an_exported_table(world: World, tmp_path: Path) -> None:
    run = world.build()
    hers = World(tmp_path / "ann")
    where = (world.recipe, {}, run.store.url)
    labelling.export(*where, hers.table)
    hers.fill(first_text)
    assert labelling.take_in(*where, hers.table) == BUDGET
    assert labelling.take_in(*where, hers.table) == 0
    assert world.build().plan.dataset != run.plan.dataset
