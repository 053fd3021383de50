"""Charts as inline SVG, without scripts or fonts; colours are variables of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

W, H = 460, 220  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 12, 34


@dataclass(frozen=True)
class Curve:
    """A named series of (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(title: str, curves: Sequence[Curve], x_name: str = "images", log_x: bool = False) -> str:
    """An HTML figure of curves over a logarithmic y axis; "" if no point is positive and finite."""
    curves = [Curve(c.name, [(x, y) for x, y in c.points if 0 < y < math.inf and (x > 0 or not log_x)]) for c in curves]
    curves = [c for c in curves if c.points]
    if not curves:
        return ""
    xs, ys = ([p[i] for c in curves for p in c.points] for i in (0, 1))
    x_axis = Axis(min(xs), max(xs), LEFT, W - RIGHT, log_x)
    y_axis = Axis(min(ys), max(ys), H - BOTTOM, TOP, True)
    parts = [f'<line class="axis" x1="{LEFT}" y1="{H - BOTTOM}" x2="{W - RIGHT}" y2="{H - BOTTOM}"/>']
    for value, label in y_axis.ticks():
        y = y_axis.at(value)
        parts.append(f'<line class="rule" x1="{LEFT}" y1="{y:.1f}" x2="{W - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in x_axis.ticks():
        parts.append(f'<text x="{x_axis.at(value):.1f}" y="{H - BOTTOM + 15}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{W - RIGHT}" y="{H - 3}" text-anchor="end">{escape(x_name)}</text>')
    for i, curve in enumerate(curves):
        points = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in curve.points)
        last = curve.points[-1]
        if len(curve.points) == 1:
            parts.append(
                f'<circle class="dot c{i}" cx="{x_axis.at(last[0]):.1f}" cy="{y_axis.at(last[1]):.1f}" r="3"/>'
            )
        parts.append(f'<polyline class="curve c{i}" points="{points}"/>')
    keys = "".join(
        f'<span class="key"><i class="c{i}"></i>{escape(c.name)} {c.points[-1][1]:.3g}</span>'
        for i, c in enumerate(curves)
    )
    svg = f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{escape(title)} {keys}</figcaption>{svg}</figure>"


class Axis:
    """Maps values from `low` to `high` to units from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        self.log, self.start, self.end = log, start, end
        if log:
            low, high = math.log10(low), math.log10(high)
            pad = max(0.05 * (high - low), 0.02)
            low, high = low - pad, high + pad
        elif low == high:
            low, high = low - 0.5, high + 0.5
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        """The position of a value."""
        t = math.log10(value) if self.log else value
        return self.start + (t - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Up to about six round values within the axis, with their labels."""
        if not self.log:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= 5)
            first = math.ceil(self.low / step)
            values = [i * step for i in range(first, math.floor(self.high / step) + 1)]
        else:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10)), tuple(1 + i / 10 for i in range(90))):
                values = [
                    m * 10.0**d for d in decades for m in steps if self.low <= math.log10(m * 10.0**d) <= self.high
                ]
                if len(values) >= 3:
                    break
            values = values[:: max(1, math.ceil(len(values) / 6))]
        return [(v, _label(v)) for v in values]


def _label(value: float) -> str:
    unit, suffix = next(((u, s) for u, s in ((1e6, "M"), (1e3, "k")) if abs(value) >= u), (1, ""))
    return f"{value / unit:.3g}{suffix}"
