"""Charts as pure functions from numbers to :class:`Figure`: reused by every report, the documentation and the README.

``lines`` and ``scatter`` live here, ``bars`` and ``intervals`` in ``rows``, ``trajectories`` in ``landscape``; all are
re-exported. Figures need no extra, except the contours of ``trajectories``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from natgrad.report import svg
from natgrad.report.drawing import HEIGHT, WIDTH, Figure, coloured, empty, frame, spread
from natgrad.report.landscape import Panel, Trajectory, trajectories
from natgrad.report.rows import Bar, Interval, bars, intervals
from natgrad.report.svg import Scale, padded
from natgrad.report.theme import Style, styles

__all__ = [
    "Bar",
    "Cloud",
    "Curve",
    "Figure",
    "Interval",
    "Panel",
    "Style",
    "Trajectory",
    "bars",
    "empty",
    "intervals",
    "lines",
    "scatter",
    "styles",
    "trajectories",
]

_LEFT, _TOP, _BOTTOM = 50, 30, 44


@dataclass(frozen=True)
class Curve:
    """A line with a band: the median of several seeds and their range at each x, and seeds drawn on their own.

    ``extras`` are single seeds (x values, y values), drawn thin with a cross at their end: runs that failed; ``seeds``
    are drawn thin without one.
    """

    name: str
    style: Style
    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    extras: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    seeds: Sequence[tuple[Sequence[float], Sequence[float]]] = ()

    @property
    def thin(self) -> list[tuple[Sequence[float], Sequence[float]]]:
        """All seeds drawn on their own."""
        return [*self.extras, *self.seeds]


def lines(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    x_offset: float = 0.0,
    log_y: bool = False,
    reference: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Figure:
    """Curves with bands, named at their ends; ``reference`` is a dashed horizontal line with its name.

    ``y_range`` limits the vertical axis; what lies outside is cut off at the frame. With ``log_x`` an ``x_offset`` > 0
    draws log(1 + x / x_offset), which has room for x = 0.
    """
    right = _names_margin([c.name for c in curves])
    xs = [v for c in curves for v in c.x] + [v for c in curves for extra in c.thin for v in extra[0]]
    xs = [v for v in xs if math.isfinite(v) and (v + x_offset > 0 or not log_x)]
    if not xs:
        return empty(name, title, "No finite values to draw.")
    ys = [v for c in curves for part in (c.middle, c.low, c.high) for v in part]
    ys += [v for c in curves for extra in c.thin for v in extra[1]]
    low, high = y_range or padded(ys, log=log_y, include=(reference[0],) if reference else ())
    spare = max(xs) > min(xs)
    x_low, x_high = (min(xs), max(xs)) if spare else padded(xs, log=log_x)
    x = Scale(x_low, x_high, _LEFT, WIDTH - right, log_x, x_offset)
    y = Scale(low, high, HEIGHT - _BOTTOM, _TOP, log_y)
    clip = f"clip-{name}"
    frame_box = f'x="{_LEFT - 3}" y="{_TOP - 3}" width="{x.end - _LEFT + 6:.1f}" height="{y.start - _TOP + 6}"'
    parts = [f'<defs><clipPath id="{clip}"><rect {frame_box}/></clipPath></defs>', frame(x, y, x_label, y_label)]
    if reference is not None:
        parts.append(svg.line(_LEFT, y(reference[0]), x.end, y(reference[0]), "reference"))
    bands = "".join(coloured(c.style, _band(c, x, y)) for c in curves)
    strokes = "".join(coloured(c.style, _strokes(c, x, y)) for c in curves)
    parts.append(f'<g clip-path="url(#{clip})">{bands}{strokes}</g>')
    parts.append(_end_labels(curves, x, y))
    if reference is not None:
        parts.append(_reference_label(reference, curves, x, y))
    return Figure(name, title, "".join(parts))


def _reference_label(reference: tuple[float, str], curves: Sequence[Curve], x: Scale, y: Scale) -> str:
    """The name of the reference line, at the end and on the side of it where it covers least of the curves."""
    at, width = y(reference[0]), svg.text_width(reference[1], 11)
    points = [p for c in curves for p in _dense(_visible(c.x, c.middle, x, y))]
    places = [(x.end - 3, "end", x.end - 3 - width), (x.start + 4, "start", x.start + 4)]
    best: tuple[int, str] | None = None
    for baseline in (at - 5, at + 13):
        for tx, anchor, left in places:
            covered = sum(left - 3 < px < left + width + 3 and baseline - 11 < py < baseline + 4 for px, py in points)
            outside = 1000 * (not y.end + 8 <= baseline <= y.start - 2)
            if best is None or covered + outside < best[0]:
                best = (covered + outside, svg.text(tx, baseline, reference[1], "note halo", anchor))
    return best[1] if best else ""


def _dense(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points with eight more on every piece between them."""
    return points + [
        (a[0] + (b[0] - a[0]) * k / 9, a[1] + (b[1] - a[1]) * k / 9) for a, b in pairwise(points) for k in range(1, 9)
    ]


def _names_margin(names: Sequence[str]) -> float:
    """Room for the longest name at the right."""
    return min(max((svg.text_width(n, 11.5, bold=True) for n in names), default=0) + 24, 170)


def _visible(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> list[tuple[float, float]]:
    """Pixel positions of the points that can be drawn."""
    return [(x(u), y(v)) for u, v in zip(xs, ys, strict=True) if x.drawable(u) and y.drawable(v)]


def _band(curve: Curve, x: Scale, y: Scale) -> str:
    if not curve.low:
        return ""
    lower, upper = _visible(curve.x, curve.low, x, y), _visible(curve.x, curve.high, x, y)
    return svg.polygon([*upper, *reversed(lower)], "band") if len(lower) > 1 and len(upper) > 1 else ""


def _strokes(curve: Curve, x: Scale, y: Scale) -> str:
    runs = [_visible(xs, ys, x, y) for xs, ys in curve.seeds]
    parts = [svg.polyline(run, "thin", curve.style.dash) for run in runs if len(run) > 1]
    points = _visible(curve.x, curve.middle, x, y)
    if len(points) > 1:
        parts.append(svg.polyline(points, "series", curve.style.dash))
    for xs, ys in curve.extras:
        run = _visible(xs, ys, x, y)
        if len(run) > 1:
            parts.append(svg.polyline(run, "thin", curve.style.dash))
        if run:
            px, py = run[-1]
            at = min(max(py, y.end), y.start)
            parts.append(svg.marker(px, at, "cross", "fail", 3.5, f"{curve.name}: a run failed here"))
    return "".join(parts)


def _end_labels(curves: Sequence[Curve], x: Scale, y: Scale) -> str:
    """A marker at each curve's end and its name at the right margin, moved apart where names would collide."""
    ends = []
    for curve in curves:
        runs = [_visible(curve.x, curve.middle, x, y)] + [_visible(u, v, x, y) for u, v in curve.thin]
        points = next((run for run in runs if run), None)
        if points:
            px, py = points[-1]
            ends.append((curve, px, min(max(py, y.end), y.start)))
    places = spread([py for _, _, py in ends], 13.5, y.end, y.start)
    parts = []
    for (curve, px, py), at in zip(ends, places, strict=True):
        tip = x.end + 12
        far = "leader far" if x.end - px > 60 else "leader"
        inner = svg.polyline([(px + 4, py), (x.end + 4, at), (tip - 1, at)], far)
        if curve.middle:
            inner += svg.marker(px, py, curve.style.marker, "dot", 4)
        inner += svg.text(tip + 1, at + 4, curve.name, "name", "start")
        parts.append(coloured(curve.style, inner))
    return "".join(parts)


@dataclass(frozen=True)
class Cloud:
    """Points of one optimizer."""

    name: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]


def scatter(name: str, title: str, clouds: Sequence[Cloud], *, x_label: str, y_label: str) -> Figure:
    """Points in log–log axes of equal range, with the diagonal on which both coordinates agree."""
    points = [
        (
            c,
            [
                (u, v)
                for u, v in zip(c.x, c.y, strict=True)
                if math.isfinite(u) and math.isfinite(v) and u > 0 and v > 0
            ],
        )
        for c in clouds
    ]
    values = [v for _, pairs in points for pair in pairs for v in pair]
    if not values:
        return empty(name, title, "No positive, finite values to draw.")
    low, high = padded(values, log=True)
    right = _names_margin([c.name for c in clouds])
    x = Scale(low, high, _LEFT + 8, WIDTH - right, True)
    y = Scale(low, high, HEIGHT - _BOTTOM, _TOP, True)
    parts = [frame(x, y, x_label, y_label), svg.line(x(low), y(low), x(high), y(high), "reference")]
    for value in x.ticks(6):
        parts.append(svg.line(x(value), y.start, x(value), y.end, "grid"))
    for cloud, pairs in points:
        dots = "".join(svg.marker(x(u), y(v), cloud.style.marker, "point", 2.4) for u, v in pairs)
        parts.append(coloured(cloud.style, dots))
    shown = [cloud for cloud, pairs in points if pairs]
    for row, cloud in enumerate(shown):
        at = _TOP + 8 + 16 * row
        inner = svg.marker(x.end + 14, at, cloud.style.marker, "dot", 4)
        inner += svg.text(x.end + 22, at + 4, cloud.name, "name", "start")
        parts.append(coloured(cloud.style, inner))
    parts.append(svg.text(x(high) - 6, y(high) + 22, "equal", "note halo", "end"))
    return Figure(name, title, "".join(parts))
