"""Curves with axes, intervals and a legend, as a picture in SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 460, 320
"""Of the plane between the axes, in pixels."""
LEFT, TOP, BOTTOM = 64, 44, 52
SIGN = 7.2
"""Width of a character of the legend."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
"""Okabe and Ito's, which colour-blind people can tell apart too."""


@dataclass(frozen=True)
class Point:
    """A measured value with its interval, if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points that belong together, in the order in which they are joined."""

    name: str
    points: Sequence[Point]
    colour: str
    dashed: bool = False
    """Drawn as a broken line with open marks."""


def plot(curves: Sequence[Curve], x: str, y: str, title: str) -> str:
    """The picture; `x` and `y` say what the axes are."""
    drawn = [curve for curve in curves if curve.points]
    everything = [point for curve in drawn for point in curve.points]
    across = _span([point.x for point in everything])
    ends = [v for p in everything for v in (p.low, p.y, p.high) if v is not None]
    up = _span(ends)

    def place(to_right: float, above: float) -> tuple[float, float]:
        return (
            LEFT + (to_right - across[0]) / (across[1] - across[0]) * WIDTH,
            TOP + (up[1] - above) / (up[1] - up[0]) * HEIGHT,
        )

    width = LEFT + WIDTH + 52 + SIGN * max(len(curve.name) for curve in drawn)
    height = TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" font-family="sans-serif" font-size="12" '
        'fill="#333">',
        f'<rect width="{width:.0f}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for value, text in _ticks(*up):
        _, level = place(across[0], value)
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{level:.1f}" y2="{level:.1f}" '
            f'stroke="#e4e4e4"/><text x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">'
            f"{text}</text>"
        )
    for value, text in _ticks(*across):
        column, _ = place(value, up[0])
        parts.append(
            f'<line x1="{column:.1f}" x2="{column:.1f}" y1="{TOP}" y2="{TOP + HEIGHT}" '
            f'stroke="#e4e4e4"/><text x="{column:.1f}" y="{TOP + HEIGHT + 18}" '
            f'text-anchor="middle">{text}</text>'
        )
    parts.append(
        f'<path d="M{LEFT},{TOP}V{TOP + HEIGHT}H{LEFT + WIDTH}" fill="none" stroke="#888"/>'
        f'<text x="{LEFT + WIDTH / 2}" y="{height - 12}" text-anchor="middle">{escape(x)}</text>'
        f'<text transform="translate(16 {TOP + HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y)}</text>"
    )
    parts += [_curve(curve, place) for curve in drawn]
    parts += [_entry(curve, LEFT + WIDTH + 14, TOP + 10 + 20 * n) for n, curve in enumerate(drawn)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _curve(curve: Curve, place: Callable[[float, float], tuple[float, float]]) -> str:
    places = [(point, *place(point.x, point.y)) for point in curve.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for _, x, y in places)
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.8"'
        f"{_dashes(curve)}/>"
    ]
    for point, x, y in places:
        if point.low is not None and point.high is not None:
            low, high = (place(point.x, end)[1] for end in (point.low, point.high))
            parts.append(
                f'<path d="M{x:.1f},{low:.1f}V{high:.1f}M{x - 3:.1f},{low:.1f}h6'
                f'M{x - 3:.1f},{high:.1f}h6" stroke="{curve.colour}" stroke-opacity="0.55"/>'
            )
        parts.append(_mark(curve, x, y))
    return "\n".join(parts)


def _entry(curve: Curve, x: float, y: float) -> str:
    """A line of the legend."""
    return (
        f'<line x1="{x}" x2="{x + 26}" y1="{y}" y2="{y}" stroke="{curve.colour}" '
        f'stroke-width="1.8"{_dashes(curve)}/>{_mark(curve, x + 13, y)}'
        f'<text x="{x + 34}" y="{y + 4}">{escape(curve.name)}</text>'
    )


def _mark(curve: Curve, x: float, y: float) -> str:
    inside = "white" if curve.dashed else curve.colour
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{inside}" stroke="{curve.colour}" '
        'stroke-width="1.4"/>'
    )


def _dashes(curve: Curve) -> str:
    return ' stroke-dasharray="5 4"' if curve.dashed else ""


def _span(values: Sequence[float]) -> tuple[float, float]:
    """From below the lowest to above the highest; from 0 itself where nothing is negative and 0 is
    near."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5
    from_zero = 0 <= low < 0.25 * (high - low)
    return (0.0 if from_zero else low - room), high + room


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Four to eight round numbers between two, and how they are written."""
    rough = (high - low) / 6
    size = 10.0 ** math.floor(math.log10(rough))
    factor = next(factor for factor in (1, 2, 5, 10) if factor * size >= rough * 0.8)
    step, decimals = factor * size, max(0, -math.floor(math.log10(factor * size)))
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(number * step, f"{number * step:,.{decimals}f}") for number in numbers]
