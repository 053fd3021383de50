"""A plot of one number against another as an SVG file of its own: a curve for each model, error bars, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pixelgrow.report.svg import Axis

W, H = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
COLOURS = ("#1f6f8b", "#c8553d", "#588157", "#8a5a9e", "#b08900", "#444b52")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444b52} .axis{stroke:#667079} .rule{stroke:#e3e6e8} "
    ".title{font-size:14px;fill:#1c2024} path{fill:none;stroke-width:1.6}"
)


@dataclass(frozen=True)
class Point:
    """x and y, each (mean, low, high); low and high are the mean where there is no interval. label: beside it."""

    x: tuple[float, float, float]
    y: tuple[float, float, float]
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Named points; two or more are joined by a line, in their order."""

    name: str
    points: Sequence[Point]


def scatter(title: str, series: Sequence[Series], x_name: str, y_name: str) -> str:
    """An SVG document. Axes are linear and need not begin at zero. At least one series has a point."""
    points = [p for s in series for p in s.points]
    x_axis = _axis([v for p in points for v in p.x], LEFT, W - RIGHT)
    y_axis = _axis([v for p in points for v in p.y], H - BOTTOM, TOP)
    parts = [f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>']
    for value, label in y_axis.ticks():
        y = y_axis.at(value)
        parts.append(f'<line class="rule" x1="{LEFT}" y1="{y:.1f}" x2="{W - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in x_axis.ticks():
        x = x_axis.at(value)
        parts.append(f'<line class="rule" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{H - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{H - BOTTOM + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{H - BOTTOM}" x2="{W - RIGHT}" y2="{H - BOTTOM}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{H - BOTTOM}"/>')
    parts.append(f'<text x="{(LEFT + W - RIGHT) / 2}" y="{H - 12}" text-anchor="middle">{escape(x_name)}</text>')
    middle = (TOP + H - BOTTOM) / 2
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(y_name)}</text>'
    )
    for i, one in enumerate(series):
        parts += _drawn(one, COLOURS[i % len(COLOURS)], x_axis, y_axis)
        if len(series) > 1:
            y = TOP + 14 + 18 * i
            parts.append(f'<circle cx="{W - RIGHT - 12}" cy="{y - 4}" r="4" fill="{COLOURS[i % len(COLOURS)]}"/>')
            parts.append(f'<text x="{W - RIGHT - 22}" y="{y}" text-anchor="end">{escape(one.name)}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" width="{W}" height="{H}" role="img">\n'
        f'<style>{_STYLE}</style>\n<rect width="{W}" height="{H}" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _drawn(series: Series, colour: str, x_axis: Axis, y_axis: Axis) -> list[str]:
    places = [(x_axis.at(p.x[0]), y_axis.at(p.y[0])) for p in series.points]
    line = " ".join(f"{'L' if i else 'M'}{x:.1f},{y:.1f}" for i, (x, y) in enumerate(places))
    parts = [f'<path d="{line}" stroke="{colour}"/>'] if len(places) > 1 else []
    for point, (x, y) in zip(series.points, places, strict=True):
        low, high = (x_axis.at(v) for v in point.x[1:])
        below, above = (y_axis.at(v) for v in point.y[1:])
        parts.append(f'<path d="M{low:.1f},{y:.1f} H{high:.1f} M{x:.1f},{below:.1f} V{above:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 7:.1f}" y="{y - 7:.1f}">{escape(point.label)}</text>')
    return parts


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis with some room around the values."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    return Axis(low - room, high + room, start, end, log=False)
