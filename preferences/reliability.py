"""How far the probabilities of a dataset are borne out by people, for its card and a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from preferences.judge_tables import NamedTable

SIDE = 320
"""Of the diagram, in pixels."""
MARGIN = 44


def reliability_words(rankings: Mapping[str, Any]) -> str:
    """What the probabilities are worth; `rankings` is the summary of the rankings' manifest."""
    found = rankings.get("calibration")
    if found is None:
        missing = rankings.get("uncalibrated")
        if missing is None:
            return "The probabilities come from what is said here alone: no judge was calibrated."
        return f"The probabilities are uncalibrated: {missing}."
    before, after = found["before"], found["after"]
    warning = ""
    if after["nll"] >= math.log(2):
        warning = (
            " The judges' word does not predict people's: no better than a coin. Look at the "
            "rubric and at the judges before using the dataset."
        )
    return (
        f"The probabilities are calibrated on {found['labels']:,} pairs judged by people, of "
        f"{found['prompts']:,} prompts.{warning} On pairs not seen in fitting, the expected "
        f"calibration error is {after['ece']:.3f}, from {before['ece']:.3f} for the judges' own "
        f"probabilities; chance alone gives {after['ece_by_chance']:.3f} on so few labels. The "
        f"negative log-likelihood is {after['nll']:.3f} nats, from {before['nll']:.3f}; with "
        f"isotonic regression it is {found['isotonic']['nll']:.3f}."
    )


def reliability_table(rankings: Mapping[str, Any]) -> NamedTable | None:
    """Predicted and seen agreement, bin by bin, before calibration and after."""
    found = rankings.get("calibration")
    if found is None:
        return None
    rows = [
        (
            f"{after['labels']:,}",
            f"{before['predicted']:.1%}",
            f"{before['seen']:.1%}",
            f"{after['predicted']:.1%}",
            f"{after['seen']:.1%}",
        )
        for before, after in zip(found["before"]["bins"], found["after"]["bins"], strict=True)
    ]
    header = ("labels", "judges said", "people agreed", "calibrated", "people agreed")
    return NamedTable("Probabilities", header, tuple(rows))


def reliability_diagram(rankings: Mapping[str, Any]) -> str | None:
    """The same as a picture, in SVG: on the dotted line, probabilities are right."""
    found = rankings.get("calibration")
    if found is None:
        return None
    side = SIDE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" '
        f'width="{side}" height="{side}" font-family="sans-serif" font-size="12">',
        f'<rect width="{side}" height="{side}" fill="white"/>',
        f'<rect x="{MARGIN}" y="{MARGIN}" width="{SIDE}" height="{SIDE}" fill="none" '
        'stroke="#999"/>',
        _line([(0.5, 0.5), (1.0, 1.0)], "#999", dotted=True),
    ]
    for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        x, y = _point(tick, tick)
        parts += [
            f'<text x="{x:.0f}" y="{side - MARGIN + 16}" text-anchor="middle">{tick:.0%}</text>',
            f'<text x="{MARGIN - 6}" y="{y + 4:.0f}" text-anchor="end">{tick:.0%}</text>',
        ]
    for place, (name, colour) in enumerate((("before", "#c0392b"), ("after", "#2563a8"))):
        points = [(b["predicted"], b["seen"]) for b in found[name]["bins"]]
        parts.append(_line(points, colour))
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
            for x, y in (_point(*p) for p in points)
        ]
        parts.append(
            f'<text x="{MARGIN + 10}" y="{MARGIN + 20 + 18 * place}" fill="{colour}">'
            f"{name} calibration, ECE {found[name]['ece']:.3f}</text>"
        )
    parts += [
        f'<text x="{side / 2}" y="{side - 8}" text-anchor="middle">'
        "probability of the preferred answer</text>",
        f'<text transform="translate(12 {side / 2}) rotate(-90)" text-anchor="middle">'
        "people who preferred it</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _point(predicted: float, seen: float) -> tuple[float, float]:
    # Both axes run from 1/2 to 1; bins in which most people disagree lie on the lower edge.
    across, up = (min(max(2 * v - 1, 0.0), 1.0) for v in (predicted, seen))
    return MARGIN + across * SIDE, MARGIN + (1 - up) * SIDE


def _line(points: list[tuple[float, float]], colour: str, dotted: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_point(*p) for p in points))
    dashes = ' stroke-dasharray="4 4"' if dotted else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
