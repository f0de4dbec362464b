"""Charts with one row per optimizer: bars with the single seeds on them, and intervals on a ratio scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from natgrad.report import svg
from natgrad.report.drawing import WIDTH, Figure, coloured, empty
from natgrad.report.svg import Scale, padded
from natgrad.report.theme import Style

_TOP, _BOTTOM = 10, 44


@dataclass(frozen=True)
class Bar:
    """A row: a bar to ``value`` (None: no bar), single ``points`` on it, an ``inner`` part, and words at its end."""

    name: str
    style: Style
    value: float | None
    points: Sequence[float] = ()
    inner: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Interval:
    """A row: a line from ``low`` to ``high``, a dot at ``middle``, a tick at ``mean``, and words at the right."""

    name: str
    style: Style
    low: float
    middle: float
    high: float
    mean: float
    note: str = ""


def bars(name: str, title: str, rows: Sequence[Bar], *, x_label: str) -> Figure:
    """Horizontal bars from zero; rows without a value keep their place and show their note."""
    values = [v for r in rows for v in (r.value, r.inner, *r.points) if v is not None and math.isfinite(v)]
    if not rows:
        return empty(name, title, "Nothing to draw.")
    left, right = _names_width(rows), _notes_width(rows)
    pitch = _pitch(len(rows))
    height = round(_TOP + pitch * len(rows) + _BOTTOM)
    x = Scale(0.0, max(values, default=1.0) * 1.02 or 1.0, left, WIDTH - right)
    parts = [_row_frame(x, len(rows), x_label, bool(values))]
    for k, row in enumerate(rows):
        half = min(pitch * 0.29, 11)
        middle = _TOP + pitch * (k + 0.5)
        inner = ""
        if row.value is not None:
            outer = "bar" if row.inner is None else "bar-soft"
            inner += svg.rectangle(left, middle - half, x(row.value) - left, 2 * half, outer, 2)
        if row.inner is not None:
            inner += svg.rectangle(left, middle - half, max(x(row.inner) - left, 1), 2 * half, "bar", 2)
        inner += "".join(svg.marker(x(p), middle, "circle", "seed", 3, svg.number(p)) for p in row.points)
        parts.append(
            _row(row, inner, middle, left, max((x(v) for v in (row.value, *row.points) if v is not None), default=left))
        )
    return Figure(name, title, "".join(parts), height=height)


def intervals(name: str, title: str, rows: Sequence[Interval], *, x_label: str, one: str) -> Figure:
    """Intervals on a ratio axis that starts at zero, or is logarithmic when they span more than a factor 12.

    ``one`` names what the dashed line at 1 stands for.
    """
    values = [v for r in rows for v in (r.low, r.middle, r.high, r.mean) if math.isfinite(v) and v > 0]
    if not values:
        return empty(name, title, "No step was timed.")
    log = max(values) / min(values) > 12
    left, right = _names_width(rows), _notes_width(rows)
    top = _TOP + 16
    pitch = _pitch(len(rows))
    height = round(top + pitch * len(rows) + _BOTTOM)
    low, high = padded(values, log=True, pad=0.03, include=(1.0,)) if log else (0.0, max(*values, 1.0) * 1.03)
    x = Scale(low, high, left, WIDTH - right, log)
    parts = [_row_frame(x, len(rows), x_label, True, top)]
    parts.append(svg.line(x(1), top - 2, x(1), top + pitch * len(rows), "reference"))
    parts.append(svg.text(x(1), top - 7, one, "note", "start" if x(1) < (left + x.end) / 2 else "end"))
    for k, row in enumerate(rows):
        middle = top + pitch * (k + 0.5)
        inner = (
            f'<line x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}" class="whisker"/>'
        )
        inner += svg.line(x(row.mean), middle - 7, x(row.mean), middle + 7, "mean")
        inner += svg.marker(x(row.middle), middle, row.style.marker, "dot", 4.5)
        parts.append(_row(row, inner, middle, left, x(row.high)))
    return Figure(name, title, "".join(parts), height=height)


def _pitch(count: int) -> float:
    """Height of one row: few rows get more air."""
    return min(max(190 / max(count, 1), 27), 44)


def _row(row: Bar | Interval, inner: str, middle: float, left: float, end: float) -> str:
    """The drawn part of a row with its name on the left and its note after its end."""
    inner += svg.text(left - 8, middle + 4, row.name, "name", "end")
    inner += svg.text(end + 8, middle + 4, row.note, "tick halo", "start")
    return coloured(row.style, inner)


def _row_frame(x: Scale, count: int, x_label: str, ticks: bool, top: float = _TOP) -> str:
    """Vertical grid, axis and label under the rows."""
    bottom = top + _pitch(count) * count
    parts = []
    last_right = -1e9
    for value in x.ticks(5) if ticks else []:
        words = svg.tick_label(value, x.log)
        half = svg.text_width(words, 11) / 2
        if x(value) - half < last_right + 6:
            continue
        last_right = x(value) + half
        parts.append(svg.line(x(value), top, x(value), bottom, "grid"))
        parts.append(svg.text(x(value), bottom + 16, words, "tick", "middle"))
    parts.append(svg.line(x.start, top, x.start, bottom, "frame"))
    parts.append(svg.text((x.start + x.end) / 2, bottom + 35, x_label, "axis", "middle"))
    return "".join(parts)


def _names_width(rows: Sequence[Bar] | Sequence[Interval]) -> float:
    return min(max((svg.text_width(r.name, 11.5, bold=True) for r in rows), default=0) + 12, 170)


def _notes_width(rows: Sequence[Bar] | Sequence[Interval]) -> float:
    return min(max((svg.text_width(r.note, 11) for r in rows), default=0) + 16, 150)
