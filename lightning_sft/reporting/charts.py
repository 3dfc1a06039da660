"""Two kinds of picture as inline SVG: lines over steps, and bars of a distribution.

Drawn here and not by matplotlib, because a page then follows the reader's light or dark colours
(the page's CSS classes colour the lines), stays sharp on a phone, and `report` starts at once.

    >>> svg = line_chart("Loss", {"train": [(1, 2.5), (2, 2.1)]}, x_label="step")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

Point = tuple[float, float]

WIDTH, HEIGHT = 400, 230  # in SVG units; few enough that 13-unit text is readable on a phone
# Room for half of "80,000" beside the last step, and for the whole of it before the axis.
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 12, 40
BAR_MARGIN = 12
MOST_POINTS = 500  # more would only make the page heavy
MOST_MARKERS = 40
LARGEST = 1e100  # beyond it, as at infinity and NaN, spans of numbers overflow


def line_chart(
    title: str, series: Mapping[str, Sequence[Point]], x_label: str, from_zero: bool = False
) -> str:
    """One line per series, on common axes, with a legend.

    Points that no picture can hold (NaN, infinity, beyond 1e100) are left out.

    Args:
        from_zero: Let the vertical axis start at 0, so that noise does not look like change.

    Returns:
        A `<figure>`, or "" when no series has a point.
    """
    lines = {
        name: [(x, y) for x, y in points if abs(x) < LARGEST and abs(y) < LARGEST]
        for name, points in series.items()
    }
    lines = {name: _thin(points) for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    frame = _Frame(
        _ticks(min(xs), max(xs), 5),
        _ticks(min(0.0, *ys) if from_zero else min(ys), max(ys), 5),
    )
    parts = _draw_axes(frame, x_label)
    for number, points in enumerate(lines.values()):
        parts += _draw_line(frame, number, points, x_label)
    keys = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><line class="line s{number}" x1="1" '
        f'y1="4" x2="23" y2="4"/></svg>{escape(name)} <b>{_last(points)}</b></li>'
        for number, (name, points) in enumerate(lines.items())
    )
    return _figure(title, parts, f'<ul class="legend">{keys}</ul>')


class _Frame(NamedTuple):
    """The numbers at both axes; the outermost ones are the picture's edges."""

    x_ticks: list[float]
    y_ticks: list[float]

    def place(self, x: float, y: float) -> tuple[str, str]:
        """Where a point is, in SVG units."""
        x_share = (x - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        y_share = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        across = LEFT + (WIDTH - LEFT - RIGHT) * x_share
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y_share
        return f"{across:.1f}", f"{down:.1f}"


def _draw_axes(frame: _Frame, x_label: str) -> list[str]:
    """Grid lines and numbers, and what the horizontal axis counts."""
    parts = []
    for tick in frame.y_ticks:
        left, down = frame.place(frame.x_ticks[0], tick)
        parts.append(
            f'<line class="grid" x1="{left}" y1="{down}" x2="{WIDTH - RIGHT}" y2="{down}"/>'
            f'<text x="{LEFT - 7}" y="{down}" dy="4" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in frame.x_ticks:
        across, _ = frame.place(tick, frame.y_ticks[0])
        parts.append(
            f'<text x="{across}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
            f"{_number(tick)}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return parts


def _draw_line(frame: _Frame, number: int, points: Sequence[Point], x_label: str) -> list[str]:
    """One series, with a dot for each point where there are few; a dot tells its figures."""
    places = [frame.place(x, y) for x, y in points]
    parts = [f'<polyline class="line s{number}" points="{" ".join(map(",".join, places))}"/>']
    if len(points) > MOST_MARKERS:
        return parts
    for (x, y), (across, down) in zip(points, places, strict=True):
        tip = f"{escape(x_label)} {_number(x)}: {y:.4g}"
        parts.append(
            f'<circle class="dot s{number}" cx="{across}" cy="{down}" r="2.6">'
            f"<title>{tip}</title></circle>"
        )
    return parts


def bar_chart(title: str, bars: Sequence[tuple[str, int]], x_label: str) -> str:
    """One bar per (label, count), its count written above it.

    Returns:
        A `<figure>`, or "" when every count is 0.
    """
    most = max((count for _, count in bars), default=0)
    if most == 0:
        return ""
    room = (WIDTH - 2 * BAR_MARGIN) / len(bars)
    base = HEIGHT - BOTTOM
    parts = [
        f'<line class="axis" x1="{BAR_MARGIN}" y1="{base}" x2="{WIDTH - BAR_MARGIN}" y2="{base}"/>'
    ]
    for number, (label, count) in enumerate(bars):
        tall = (base - TOP - 16) * count / most
        left = BAR_MARGIN + number * room
        middle = left + room / 2
        parts.append(
            f'<rect class="bar" x="{left + room * 0.1:.1f}" y="{base - tall:.1f}" '
            f'width="{room * 0.8:.1f}" height="{tall:.1f}" rx="2">'
            f"<title>{escape(label)}: {count}</title></rect>"
        )
        if count:
            parts.append(
                f'<text class="strong" x="{middle:.1f}" y="{base - tall - 5:.1f}" '
                f'text-anchor="middle">{count}</text>'
            )
        parts.append(
            f'<text x="{middle:.1f}" y="{base + 17}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return _figure(title, parts, "")


def _figure(title: str, parts: Sequence[str], legend: str) -> str:
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most about `MOST_POINTS` points, first and last among them."""
    stride = math.ceil(len(points) / MOST_POINTS)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that span low to high; at least two."""
    if high <= low:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _last(points: Sequence[Point]) -> str:
    value = points[-1][1]
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
