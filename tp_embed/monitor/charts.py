"""Line charts as SVG, of numbers, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

# Okabe and Ito's colours, which people who are colour-blind can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")

Series = tuple[str, Sequence[float], Sequence[float]]

_WIDTH, _HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 38
_MOST_POINTS = 800


def line_chart(series: Sequence[Series], *, x_label: str = "step", from_zero: bool = False) -> str:
    """One line for each (name, x, y), over common axes; points that are not finite are left out.

    More than 800 points are thinned out to the least and the greatest of each stretch, so that no
    peak gets lost. Where there are few, each has its values as a tooltip.

    :param from_zero: whether the vertical axis begins at 0 wherever the least value is.
    """
    shown = [(name, *_finite(x, y)) for name, x, y in series]
    points = [point for _, x, y in shown for point in zip(x, y, strict=True)]
    if not points:
        return '<p class="empty">no data</p>'
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points), 6, whole=True)
    low, high = min(y for _, y in points), max(y for _, y in points)
    y_ticks = _ticks(0.0 if from_zero or 0 <= low < 0.4 * high else low, high, 4)
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    bottom, top = min(y_ticks[0], low), max(y_ticks[-1], high)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - bottom) / (top - bottom) if top > bottom else 0.5
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(left, tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in x_ticks:
        if left <= tick <= right:
            x, _ = place(tick, bottom)
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{number(tick)}</text>'
            )
    x, y = _WIDTH - _RIGHT, _HEIGHT - 5
    parts.append(f'<text class="axis" x="{x}" y="{y}" text-anchor="end">{escape(x_label)}</text>')
    for color, (name, xs, ys) in zip(_cycle(len(shown)), shown, strict=True):
        placed = [place(x, y) for x, y in _thin(list(zip(xs, ys, strict=True)))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" stroke="{color}"/>')
        if len(xs) <= 60:
            for x, y in zip(xs, ys, strict=True):
                cx, cy = place(x, y)
                parts.append(
                    f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2.5" fill="{color}"><title>'
                    f"{escape(name)}, {escape(x_label)} {number(x)}: {number(y)}</title></circle>"
                )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">' + "".join(parts) + "</svg>"


def legend(names: Iterable[str]) -> str:
    """What the colours of a chart with these lines mean; nothing for a single one."""
    names = list(names)
    if len(names) < 2:
        return ""
    items = (
        f'<span><i style="background:{color}"></i>{escape(name)}</span>'
        for color, name in zip(_cycle(len(names)), names, strict=True)
    )
    return f'<div class="legend">{"".join(items)}</div>'


def number(value: float) -> str:
    """A number for people: 1.23M, 3550, 0.0456."""
    if not math.isfinite(value):
        return str(value)
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _finite(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return [a for a, _ in kept], [b for _, b in kept]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        lowest, highest = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += sorted({lowest, highest})
    return kept


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About ``count`` round numbers from not more than ``low`` to not less than ``high``."""
    span = (high - low) or abs(high) or 1.0
    step: float = 10 ** math.floor(math.log10(span / count))
    step *= min((1, 2, 5, 10), key=lambda factor: abs(span / (factor * step) - count))
    if whole:
        step = max(1, round(step))
    first = math.floor(low / step + 1e-9)
    return [i * step for i in range(first, math.ceil(high / step - 1e-9) + 1)]
