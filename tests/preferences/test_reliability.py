"""How far probabilities are borne out, told in words, as a table and as a picture."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from preferences.reliability import (
    MARGIN,
    SIDE,
    reliability_diagram,
    reliability_table,
    reliability_words,
)


def figures(ece: float, nll: float, *bins: tuple[int, float, float]) -> dict[str, Any]:
    names = ("labels", "predicted", "seen")
    told = [dict(zip(names, b, strict=True)) for b in bins]
    return {"ece": ece, "nll": nll, "ece_by_chance": 0.04, "bins": told}


CALIBRATED = {
    "calibration": {
        "labels": 1200,
        "prompts": 900,
        "before": figures(0.12, 0.7, (600, 0.75, 0.6), (600, 1.0, 0.45)),
        "after": figures(0.02, 0.55, (600, 0.5, 0.5), (600, 0.75, 0.75)),
        "isotonic": figures(0.03, 0.56),
    },
    "uncalibrated": None,
}


def test_a_calibration_is_told_with_what_it_was_before() -> None:
    words = reliability_words(CALIBRATED)
    assert "1,200 pairs judged by people, of 900 prompts" in words
    assert "is 0.020, from 0.120" in words
    assert "is 0.550 nats, from 0.700" in words
    table = reliability_table(CALIBRATED)
    assert table is not None
    assert table.rows == (
        ("600", "75.0%", "60.0%", "50.0%", "50.0%"),
        ("600", "100.0%", "45.0%", "75.0%", "75.0%"),
    )


def test_judges_who_do_not_predict_people_are_told_of() -> None:
    told = {**CALIBRATED["calibration"], "after": figures(0.1, 0.694)}
    assert "no better than a coin" in reliability_words({"calibration": told})
    assert "no better than a coin" not in reliability_words(CALIBRATED)


def test_without_a_calibration_the_reason_is_told_and_nothing_is_drawn() -> None:
    missing = {"calibration": None, "uncalibrated": "3 verdicts"}
    assert reliability_words(missing) == "The probabilities are uncalibrated: 3 verdicts."
    assert reliability_table(missing) is None
    assert reliability_diagram(missing) is None


def test_the_diagram_has_its_points_where_they_belong() -> None:
    drawn = reliability_diagram(CALIBRATED)
    assert drawn is not None
    picture = ElementTree.fromstring(drawn)
    circles = [
        (float(c.attrib["cx"]), float(c.attrib["cy"]))
        for c in picture.iter()
        if c.tag.endswith("circle")
    ]
    # From 1/2 to 1 on both axes: 3/4 is half-way, 0.6 a fifth up; below 1/2 lies on the edge.
    half = MARGIN + SIDE / 2
    low, high = MARGIN, MARGIN + SIDE
    assert circles == [(half, high - SIDE / 5), (high, high), (low, high), (half, half)]
    assert re.search("after calibration, ECE 0.020", drawn)
