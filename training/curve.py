"""The learning curve of a run, as a picture in SVG: scores and losses above, probes below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 520, 180
"""Of one panel, in pixels."""
MARGIN, GAP = 52, 44

Curve = Sequence[tuple[float, float]]
"""Points of (step, value)."""

BLUE, RED, GREEN = "#2563a8", "#c0392b", "#2e8b57"


def learning_curve(lines: Sequence[Mapping[str, Any]]) -> str:
    """The picture, from the lines of `metrics.jsonl`.

    One panel has the training and the held-out loss by step. Where answers are sampled and scored,
    panels above it have their mean score and their KL from the reference; where the policy was
    probed, one below it has its win rate against the reference and the share of malformed answers.
    What a run did not measure is left out.
    """
    score = {"mean score of its answers": (BLUE, _values(lines, "score"))}
    distance = {"KL from the reference, nats an answer": (RED, _values(lines, "kl"))}
    losses = {
        "training loss": (BLUE, _values(lines, "loss")),
        "held-out loss": (RED, _values(lines, "eval_loss")),
    }
    probes = [{"step": line["step"], **line["probe"]} for line in lines if "probe" in line]
    shares = {
        "win rate against the reference": (GREEN, _values(probes, "win_rate")),
        "malformed answers": (RED, _values(probes, "malformed")),
    }
    last = max([1.0, *(float(line["step"]) for line in lines)])
    shown = [curves for curves in (score, distance) if any(points for _, points in curves.values())]
    if not shown or any(points for _, points in losses.values()):
        shown.append(losses)
    panels = [_panel(place, last, _range(curves), curves) for place, curves in enumerate(shown)]
    if probes:
        panels.append(_panel(len(panels), last, (0.0, 1.0), shares))
    height = 2 * MARGIN + len(panels) * HEIGHT + (len(panels) - 1) * GAP
    width = WIDTH + 2 * MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *panels,
            f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">step</text>',
            "</svg>\n",
        ]
    )


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _range(curves: Mapping[str, tuple[str, Curve]]) -> tuple[float, float]:
    """Lowest and highest value of the axis."""
    values = [value for _, points in curves.values() for _, value in points]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def _panel(
    place: int, last: float, span: tuple[float, float], curves: Mapping[str, tuple[str, Curve]]
) -> str:
    low, high = span
    top = MARGIN + place * (HEIGHT + GAP)

    def point(step: float, value: float) -> tuple[float, float]:
        return MARGIN + step / last * WIDTH, top + (high - value) / (high - low) * HEIGHT

    parts = [
        f'<rect x="{MARGIN}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" '
        'stroke="#999"/>'
    ]
    for value in _ticks(low, high):
        _, y = point(0, value)
        parts.append(
            f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
            f'<line x1="{MARGIN}" x2="{MARGIN + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="#eee"/>'
        )
    for step in _ticks(0, last):
        x, _ = point(step, low)
        parts.append(
            f'<text x="{x:.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{step:.4g}</text>'
        )
    drawn = {name: curve for name, curve in curves.items() if curve[1]}
    for row, (name, (colour, points)) in enumerate(drawn.items()):
        places = [point(*p) for p in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            + "".join(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places
            )
            + f'<text x="{MARGIN + WIDTH - 8}" y="{top + 18 + 16 * row}" text-anchor="end" '
            f'fill="{colour}">{escape(name)}</text>'
        )
    return "\n".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between two."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * next(factor for factor in (1, 2, 5, 10) if factor * size >= rough * 0.8)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]
