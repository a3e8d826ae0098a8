"""Recipes with each kind of judge that asks a language model, from answers to a dataset."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from flows.judges import calls
from flows.plan import make_plan
from flows.recipe import load_recipe
from flows.run import groups
from preferences.errors import InputError
from tests.flows.asking import carry_out
from tests.generation.endpoint import Answer, Endpoint, reply
from tests.generation.tiny_model import write_model

GOOD = "The sum is"
KINDS: dict[str, dict[str, Any]] = {
    "pairwise": {"kind": "pairwise"},
    "reasoned": {"kind": "pairwise_reasoned", "samples": 2, "temperature": 0.5, "max_tokens": 64},
    "pointwise": {"kind": "pointwise", "criteria": {"helpful": 2, "mine.md": 1}},
    "listwise": {"kind": "listwise", "rubric": "honest", "rounds": 2},
}
"""By what a test calls it, the keys that tell it from the others."""


def judging(body: dict[str, Any], number: int) -> Answer:
    """A model that prefers the good answer, by whatever it is asked for."""
    asked = body["messages"][0]["content"]
    shown = re.findall(r"<answer(?:_([A-Z]))?>\n(.*?)\n</answer", asked, re.DOTALL)
    good = [letter for letter, answer in shown if answer.startswith(GOOD)]
    bad = [letter for letter, answer in shown if not answer.startswith(GOOD)]
    if "Rank all" in asked:
        return reply(" > ".join([*good, *bad]))
    if "Give your reasons" in asked:
        # Half of the time it forgets its verdict, until it is asked for it.
        forgets = len(body["messages"]) == 1 and body["seed"] % 2
        return reply("I forgot what to say." if forgets else f"It adds up.\n\n[[{good[0]}]]")
    if "1 to 5" in asked:
        likely, other = ("5", "2") if good else ("2", "5")
    else:
        likely, other = *good, *bad
    tokens = [
        {"token": token, "logprob": math.log(p), "bytes": None, "top_logprobs": []}
        for token, p in ((likely, 0.75), (other, 0.25))
    ]
    return reply(likely, logprobs={"content": [{**tokens[0], "top_logprobs": tokens}]})


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    endpoint = Endpoint(judging)
    yield endpoint
    endpoint.close()


def write_recipe(
    folder: Path, url: str, judges: dict[str, dict[str, Any]], prompts: int = 12
) -> Path:
    """Two imported answers to each prompt, the good one first for every second prompt."""
    rows = [
        {"prompt": f"What is {n} and {n}?", "model": model, "response": text}
        for n in range(prompts)
        for model, text in (
            ("one", f"{GOOD} {2 * n}." if n % 2 else f"I forgot {n}."),
            ("two", f"I forgot {n}." if n % 2 else f"{GOOD} {2 * n}."),
        )
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.md").write_text("is right\n\n- Is the sum what it should be?\n")
    values = {
        "name": "judged",
        "candidates": [{"kind": "import", "name": "answers", "source": "answers.jsonl"}],
        "judges": [{"name": n, "engine": "openai", "model": "m"} | j for n, j in judges.items()],
        "pairs": {"min_probability": 0.5},
        "split": {"test": 0.3},
        "runtime": {"engines": {n: {"base_url": url} for n in judges}, "shard_size": 5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_judge_makes_a_dataset_of_the_good_answers(
    name: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, endpoint.url, {name: KINDS[name]})
    run = carry_out(path, tmp_path / "store")
    pairs = [
        pair
        for part in (tmp_path / "store" / "artifacts" / "dataset").rglob("*.parquet")
        for pair in pq.read_table(part).to_pylist()
    ]
    assert len(pairs) == 12
    for pair in pairs:
        assert pair["chosen"][0]["content"].startswith(GOOD)
        assert pair["rejected"][0]["content"].startswith("I forgot")
    # Each call that was told of is one that was made, but for those asked once more.
    told = sum(calls(run.plan.recipe.judges[0], g) for s in run.shards for g in groups(run, s))
    first = [body for body in endpoint.calls if len(body["messages"]) == 1]
    # 12 prompts of two answers: two orders, or two answers, or two orders of a list; the reasoned
    # judge is asked twice each time, and the scoring one about two criteria.
    assert told == len(first) == 12 * 2 * (2 if name in ("reasoned", "pointwise") else 1)
    assert (len(endpoint.calls) > len(first)) == (name == "reasoned")


def test_a_list_of_three_answers_has_the_good_one_first(endpoint: Endpoint, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, endpoint.url, {"listwise": KINDS["listwise"]})
    with (tmp_path / "answers.jsonl").open("a") as table:
        for n in range(12):
            row = {"prompt": f"What is {n} and {n}?", "model": "three", "response": "No idea."}
            table.write(json.dumps(row) + "\n")
    carry_out(path, tmp_path / "store")
    artifacts = tmp_path / "store" / "artifacts"
    judgments = [
        row
        for part in artifacts.glob("judgments/*/*")
        if part.suffix == ".parquet"
        for row in pq.read_table(part).to_pylist()
    ]
    assert [len(row["candidate_ids"]) for row in judgments] == [3] * 24
    pairs = [
        row
        for part in artifacts.glob("dataset/*/data/*")
        for row in pq.read_table(part).to_pylist()
    ]
    assert len(pairs) == 12
    assert all(pair["chosen"][0]["content"].startswith(GOOD) for pair in pairs)


def test_a_second_run_asks_nothing_again(endpoint: Endpoint, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, endpoint.url, KINDS)
    carry_out(path, tmp_path / "store")
    asked = len(endpoint.calls)
    # Without the artifacts all that is left is the journal.
    (tmp_path / "store" / "artifacts").rename(tmp_path / "before")
    carry_out(path, tmp_path / "store")
    assert len(endpoint.calls) == asked
    for part in sorted((tmp_path / "before").rglob("judgments/*/*.parquet")):
        again = tmp_path / "store" / "artifacts" / part.relative_to(tmp_path / "before")
        assert pq.read_table(part).equals(pq.read_table(again))


@pytest.mark.timeout(120)
def test_a_model_of_this_process_gives_each_kind_of_judgment_or_a_reason(tmp_path: Path) -> None:
    # Of random weights nothing sensible is to be expected: only that all of it runs.
    model = str(write_model(tmp_path / "model"))
    (tmp_path / "short.md").write_text("{{prompt}} {{first}} {{second}} [[A]]?")
    (tmp_path / "score.md").write_text("{{prompt}} {{answer}}")
    (tmp_path / "list.md").write_text("{{prompt}} {{answers}}")
    of_this = {"engine": "transformers", "model": model, "dtype": "float32"}
    judges = {
        "reasoned": KINDS["reasoned"] | of_this | {"rubric": "short.md", "max_tokens": 8},
        "pointwise": {"kind": "pointwise", "criteria": {"score.md": 1}} | of_this,
        "listwise": KINDS["listwise"] | of_this | {"rubric": "list.md"},
        "order": {"kind": "prior", "order": ["one", "two"]},
    }
    path = write_recipe(tmp_path, "", judges, prompts=4)
    values = yaml.safe_load(path.read_text())
    for judge in values["judges"]:
        if judge["kind"] == "prior":
            del judge["engine"], judge["model"]
    path.write_text(yaml.safe_dump(values))
    carry_out(path, tmp_path / "store")
    rows = [
        row
        for part in (tmp_path / "store" / "artifacts" / "judgments").rglob("part-*.parquet")
        for row in pq.read_table(part).to_pylist()
    ]
    of = {kind: [r for r in rows if r["kind"] == kind] for kind in {r["kind"] for r in rows}}
    assert {kind: len(found) for kind, found in of.items()} == {
        "pairwise_reasoned": 8,
        "pointwise": 8,
        "listwise": 8,
        "prior": 4,
    }
    for row in rows:
        said = [row[key] for key in ("probability", "verdict", "scores") if row[key] is not None]
        assert (row["failure"] is None) == (len(said) == 1)
    # The engine gives the digits' probabilities, so that a score is there or says how little.
    for row in of["pointwise"]:
        assert row["verdict_mass"] is not None
        assert row["scores"] is None or 1 <= row["scores"][0] <= 5


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"kind": "pairwise_reasoned", "rubric": "helpfull"}, "did you mean 'helpful'"),
        ({"kind": "pointwise", "criteria": {"helpfull": 1}}, "did you mean 'helpful'"),
        ({"kind": "pointwise", "criteria": {"helpful": 0}}, "greater than 0"),
        ({"kind": "pointwise", "criteria": {"list.md": 1}}, "for a listwise judge; a pointwise"),
        ({"kind": "listwise", "rubric": "score.md"}, "for a pointwise judge; a listwise one"),
        ({"kind": "listwise", "round": 2}, "unknown key; did you mean 'rounds'?"),
        ({"kind": "pairwise_reasoned", "samples": 2, "temperature": 0}, "raise `temperature`"),
        ({"kind": "pairwise_resoned"}, "did you mean 'pairwise_reasoned'?"),
    ],
)
def test_a_mistake_in_a_judge_is_one_line_before_anything_is_asked(
    tmp_path: Path, judge: dict[str, Any], message: str
) -> None:
    (tmp_path / "score.md").write_text("{{prompt}} {{answer}}")
    (tmp_path / "list.md").write_text("{{prompt}} {{answers}}")
    path = write_recipe(tmp_path, "http://localhost:9/v1", {"judge": judge})
    with pytest.raises(InputError) as raised:
        make_plan(load_recipe(path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("reasoned", {"samples": 3}),
        ("reasoned", {"temperature": 0.6}),
        ("reasoned", {"max_tokens": 65}),
        ("reasoned", {"rubric": "honest"}),
        ("pointwise", {"criteria": {"helpful": 1, "mine.md": 1}}),
        ("pointwise", {"criteria": {"helpful": 2}}),
        ("listwise", {"rounds": 3}),
        ("listwise", {"rubric": "helpful"}),
    ],
)
def test_what_changes_a_judgment_makes_it_another_artifact(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    plans = [
        make_plan(load_recipe(write_recipe(tmp_path, "http://localhost:9/v1", {name: judge})))
        for judge in (KINDS[name], KINDS[name] | changes)
    ]
    assert plans[0].judgments != plans[1].judgments
    assert plans[0].candidates == plans[1].candidates


def test_criteria_of_your_own_bear_identity_by_what_they_say_and_not_by_where_they_lie(
    tmp_path: Path,
) -> None:
    plans = []
    for place, text in (("here", None), ("there", None), ("edited", "is wrong\n\n- Is it?\n")):
        (tmp_path / place).mkdir()
        path = write_recipe(tmp_path / place, "http://x/v1", {"p": KINDS["pointwise"]})
        if text is not None:
            (tmp_path / place / "mine.md").write_text(text)
        plans.append(make_plan(load_recipe(path)))
    here, there, edited = plans
    assert here.judgments == there.judgments
    assert here.judgments != edited.judgments
