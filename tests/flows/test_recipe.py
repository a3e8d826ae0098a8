"""Recipes: what is wrong is said in one line before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main
from flows.plan import make_plan
from flows.recipe import load_recipe
from preferences.errors import InputError

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "recipes" / "miniature"


def recipe(folder: Path, **changes: Any) -> Path:
    """A small good recipe of imported answers, with changes."""
    rows = [
        {"prompt_id": f"q{n}", "prompt": f"question {n}", "response": f"{m} answer {n}", "model": m}
        for n in range(40)
        for m in ("strong", "weak")
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "name": "small",
        "candidates": [{"kind": "import", "name": "answers", "source": "answers.jsonl"}],
        "judges": [{"kind": "prior", "name": "order", "order": ["strong", "weak"]}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return path


def pairwright(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Call the command line; returns its exit code."""
    monkeypatch.setattr("sys.argv", ["pairwright", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("**/*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_that_ships_is_valid(path: Path) -> None:
    text = path.read_text()
    settings = {name: "folder" for name in ("data", "policy") if f"${{{name}}}" in text}
    assert load_recipe(path, settings).name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judgs": []}, "judgs: unknown key; did you mean 'judges'?"),
        (
            {"alignment": {"method": "reward", "model": "m"}, "evaluation": {}},
            "evaluation: a reward model gives no answers to compare",
        ),
        ({"pairs": {"polcy": "best_worst"}}, "pairs.polcy: unknown key; did you mean 'policy'?"),
        ({"split": {"test": "much"}}, "split.test: 'much'"),
        ({"judges": [{"kind": "priors", "name": "x"}]}, "did you mean 'prior'?"),
        (
            {"candidates": [{"kind": "import", "name": "a", "source": "answer.jsonl"}]},
            "no such file",
        ),
        (
            {"judges": [{"kind": "prior", "name": "order", "order": ["stronk", "weak"]}]},
            "did you mean 'strong'?",
        ),
        (
            {"judges": [{"kind": "pairwise", "name": "j", "model": "./nowhere"}]},
            "./nowhere: no such folder",
        ),
        (
            {
                "judges": [
                    {
                        "kind": "pairwise",
                        "name": "j",
                        "engine": "openai",
                        "model": "m",
                        "rubric": "helpfull",
                    }
                ]
            },
            "did you mean 'helpful'?",
        ),
        (
            {
                "candidates": [
                    {
                        "kind": "import",
                        "name": "a",
                        "source": "answers.jsonl",
                        "columns": {"response": "respons"},
                    }
                ]
            },
            "no column 'respons'; did you mean 'response'?",
        ),
        ({"split": {"test": 0.0001}}, "the test side is empty"),
    ],
)
def test_a_wrong_recipe_exits_2_with_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    store = tmp_path / "store"
    path = recipe(tmp_path, **changes)
    assert pairwright(monkeypatch, "run", str(path), "--store", str(store)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not store.exists()


def test_a_bad_line_is_named_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path)
    table = tmp_path / "answers.jsonl"
    lines = table.read_text().splitlines()
    lines[6] = lines[6][:-3]
    table.write_text("\n".join(lines))
    store = tmp_path / "store"
    assert pairwright(monkeypatch, "run", str(path), "--store", str(store)) == 2
    assert "answers.jsonl:7: not JSON" in capsys.readouterr().err
    assert not store.exists()


def test_a_variable_without_a_value_says_how_to_give_one() -> None:
    with pytest.raises(InputError, match=r"\$\{data\} has no value; add --set data=VALUE"):
        load_recipe(ROOT / "recipes" / "hh_rlhf.yaml")


def test_a_recipe_of_its_own_init_names_what_to_fill_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    assert pairwright(monkeypatch, "init", str(path)) == 0
    assert pairwright(monkeypatch, "init", str(path)) == 2
    assert "already exists" in capsys.readouterr().err
    assert pairwright(monkeypatch, "check", str(path)) == 2
    assert "prompts.jsonl: no such file" in capsys.readouterr().err


def test_the_plan_follows_the_content_of_files_and_not_their_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    plans = [make_plan(load_recipe(recipe(tmp_path / name))) for name in ("here", "there")]
    assert plans[0].dataset == plans[1].dataset
    with (tmp_path / "there" / "answers.jsonl").open("a") as table:
        table.write(json.dumps({"prompt": "new", "response": "x", "model": "strong"}) + "\n")
    changed = make_plan(load_recipe(tmp_path / "there" / "recipe.yaml"))
    assert changed.dataset != plans[0].dataset


def test_an_edited_rubric_changes_the_judgments_and_what_follows_only(tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.md"
    judge = {"kind": "pairwise", "name": "j", "engine": "openai", "model": "m"}
    path = recipe(tmp_path, judges=[{**judge, "rubric": "rubric.md"}])
    plans = []
    for text in ("{{prompt}} {{first}} {{second}} A or B?", "{{prompt}} {{first}} {{second}} B?"):
        rubric.write_text(text)
        plans.append(make_plan(load_recipe(path)))
    before, after = plans
    assert before.prompts == after.prompts
    assert before.candidates == after.candidates
    assert before.judgments != after.judgments
    assert before.dataset != after.dataset


def test_where_it_runs_never_bears_identity(tmp_path: Path) -> None:
    plain = make_plan(load_recipe(recipe(tmp_path)))
    moved = make_plan(load_recipe(recipe(tmp_path, runtime={"shard_size": 3, "store": "other"})))
    assert [a for _, a in plain.artifacts] == [a for _, a in moved.artifacts]
