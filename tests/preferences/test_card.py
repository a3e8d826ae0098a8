"""The dataset card, and how judging is told in it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from typing import Any

import pytest
import yaml

from judging.agreement import agreement, judge_facts
from preferences.card import dataset_card, markdown_table
from preferences.judge_tables import MAX_ROWS, NamedTable, judge_costs, judge_tables
from preferences.records import Judgment
from preferences.store import Manifest
from tests.judging.groups import group, judged


def summary(*judged_groups: Any) -> dict[str, Any]:
    """What a manifest holds: an agreement as it comes back from JSON."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(agreement(judged_groups))))
    return found


def made(stage: str, name: str, **summary: Any) -> Manifest:
    return Manifest(stage, "f" * 20, name, 10, 0, (), summary=summary)


def card(*stages: Manifest) -> str:
    return dataset_card("pairs", "", None, {"train": None}, stages, "name: pairs")


def two_judges(verdict: str, category: str | None = None) -> tuple[Any, list[Judgment]]:
    """A pair that two judges judged, the first for the first answer."""
    of = group("a", "bb", question=f"{verdict} {category}")
    of = dataclasses.replace(of, prompt=dataclasses.replace(of.prompt, category=category))
    one = judged(of, 0, 1, 0.9)
    other = dataclasses.replace(judged(of, 1, 0, None, verdict=verdict), judge="k|x\ny")
    return of, [one, other]


def test_the_card_tells_how_judges_judged_and_agree() -> None:
    # The second reads the answers in the other order: its "second" is the first judge's verdict.
    said = summary(two_judges("second"), two_judges("first"))
    text = card(
        made("judgments", "judgments: j", judge=asdict(judge_facts([])) | {"cost": 1.5}),
        made("rankings", "rankings", agreement=said, uncalibrated="no person was asked"),
    )
    # Both answers shown first were preferred by j: 100 %, never the longer one.
    assert "| j | 2 | 0.0% | 100.0% | 0.0% | 1.50 |" in text
    # The other judge preferred the first shown, the longer, in one of two. No bar and no line break
    # of its name is left to break the table.
    assert "| k\\|x y | 2 | 0.0% | 50.0% | 50.0% |  |" in text
    assert "| j | k\\|x y | 2 | 50.0% | 50.0% | 0.000 |" in text
    # Coincidences of (first, first) and (first, second): 1 - 3 * 1 / (3 * 1) = 0.
    assert "| all judges | 2 | 0.000 | 0.000 |" in text
    assert "The probabilities are uncalibrated: no person was asked." in text


def test_where_a_coefficient_has_no_value_the_table_says_why() -> None:
    text = card(made("rankings", "rankings", agreement=summary(two_judges("second"))))
    assert "| 1 | 100.0% | 100.0% | only one verdict occurs |" in text
    assert "| all judges | 1 | only one verdict occurs | only one verdict occurs |" in text


def test_one_judge_has_judged_and_nobody_agrees() -> None:
    of = group("a", "b")
    tables = judge_tables(summary((of, [judged(of, 0, 1, 0.9)])), {})
    assert [t.title for t in tables] == ["Judges"]
    assert tables[0].note == "No pair was judged by two raters."


def test_categories_have_tables_of_their_own() -> None:
    said = summary(two_judges("second", "chat"), two_judges("first", None))
    tables = {t.title: t for t in judge_tables(said, {"j": 2.0})}
    assert [row[:2] for row in tables["Judges by category"].rows] == [
        ("none", "j"),
        ("none", "k|x\ny"),
        ("chat", "j"),
        ("chat", "k|x\ny"),
    ]
    assert tables["Agreement by category"].rows[1][3:5] == ("1", "100.0%")
    # A judge's cost is not known by category, so that column is left out there.
    assert [row[-1] for row in tables["Judges"].rows] == ["2.00", ""]
    assert "cost" not in tables["Judges by category"].header
    for table in tables.values():
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_a_judge_that_favours_its_family_is_shown_beside_the_others() -> None:
    said = summary(two_judges("first"))
    said["raters"][0] |= {"family": "gpt", "family_wins": 0.75, "family_wins_by_others": 0.5}
    said["raters"][0] |= {"unusable": 3}
    table = judge_tables(said, {})[0]
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["missing"] == "0.0% and 3 unusable"
    assert row["its family wins (by others)"] == "gpt: 75.0% (50.0%)"


def test_what_a_long_table_leaves_out_is_said() -> None:
    said = summary(two_judges("first"))
    said["raters"] = [said["raters"][0] | {"rater": f"r{n}"} for n in range(MAX_ROWS + 7)]
    table = judge_tables(said, {})[0]
    assert len(table.rows) == MAX_ROWS
    assert table.note == "7 more rows are in the manifest of the rankings."


@pytest.mark.parametrize("stages", [(), (made("rankings", "rankings"),)])
def test_without_figures_there_is_no_word_of_judges(stages: tuple[Manifest, ...]) -> None:
    assert "## Judges" not in card(*stages)
    assert judge_costs(stages) == {}
    nothing = {"raters": [], "between": [], "reliability": []}
    assert judge_tables(nothing, {}) == []


def test_costs_are_those_of_judges_that_cost_anything() -> None:
    free, paid = asdict(judge_facts([])), asdict(judge_facts([])) | {"cost": 0.25}
    stages = [made("judgments", "judgments: a", judge=free), made("x", "judgments: b", judge=paid)]
    assert judge_costs(stages) == {"b": 0.25}


def test_a_table_is_a_table_whatever_its_cells_hold() -> None:
    lines = markdown_table(["a|b"], [["x\ny"], ["p\r\nq|"]]).split("\n")
    assert lines == ["| a\\|b |", "| --- |", "| x y |", "| p q\\| |"]
    assert NamedTable("t", ("a",), (("x",),)).note == ""


def test_a_recipe_with_backticks_stays_inside_its_block() -> None:
    recipe = "description: |\n  ```\n  ````\n  # not a heading"
    text = dataset_card("pairs", "", None, {"train": None}, [], recipe)
    assert f"`````yaml\n{recipe}\n`````" in text


def test_a_license_is_one_value_of_the_front_matter_whatever_it_holds() -> None:
    text = dataset_card("pairs", "", "mit\ntags: [evil]", {"train": None}, [], "name: pairs")
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit\ntags: [evil]"
    assert front["tags"] == ["preference", "dpo", "pairwright"]
