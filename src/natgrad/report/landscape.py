"""Optimisation paths over the loss surface of a model with two parameters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from natgrad.errors import ArgumentError, MissingExtraError
from natgrad.report import svg
from natgrad.report.drawing import Figure, coloured, frame
from natgrad.report.svg import Scale
from natgrad.report.theme import Style

_PANEL, _GAP, _LEFT, _TOP, _BOTTOM = 300, 34, 46, 58, 46


@dataclass(frozen=True)
class Trajectory:
    """A path ``points`` [T, 2] in the coordinates of its panel; ``slot`` picks the hue, ``dash`` the stroke."""

    label: str
    points: ArrayLike
    slot: int = 0
    dash: str = ""
    marker: str = "circle"


@dataclass(frozen=True)
class Panel:
    """One map of the loss: ``loss`` [len(y), len(x)] on the grid ``x`` × ``y``, with paths drawn over it."""

    title: str
    x: ArrayLike
    y: ArrayLike
    loss: ArrayLike
    paths: Sequence[Trajectory] = field(default_factory=tuple)
    x_label: str = "θ₁"
    y_label: str = "θ₂"


def trajectories(
    panels: Sequence[Panel],
    *,
    title: str,
    caption: str = "",
    minimum: tuple[float, float] | None = None,
    levels: int = 14,
    name: str = "trajectories",
) -> Figure:
    """Panels side by side: contours of the loss (levels at its quantiles over the map) and the paths of optimizers.

    Later paths are drawn thinner, so that paths that coincide stay visible one inside the other.
    To show invariance, give two panels over the same model, say gradient descent and natural gradient, each with its
    paths in two parameterisations mapped to the coordinates of the panel: paths of an invariant method coincide.
    ``minimum`` is marked with a ring. Needs the ``report`` extra for the contours.
    """
    if not panels:
        raise ArgumentError("trajectories() was given no panel: pass at least one Panel(title, x, y, loss, paths).")
    width = _LEFT + len(panels) * _PANEL + (len(panels) - 1) * (_GAP + _LEFT) + 16
    height = _TOP + _PANEL + _BOTTOM
    parts = []
    for k, panel in enumerate(panels):
        left = _LEFT + k * (_PANEL + _GAP + _LEFT)
        parts.append(f'<g transform="translate({left} 0)">{_panel(panel, f"{name}-{k}", minimum, levels)}</g>')
    described = caption or "; ".join(f"{p.title}: {', '.join(t.label for t in p.paths)}" for p in panels)
    return Figure(name, title, "".join(parts), described, caption, width=width, height=height)


def _panel(panel: Panel, name: str, minimum: tuple[float, float] | None, levels: int) -> str:
    xs, ys, loss = (np.asarray(a, dtype=float) for a in (panel.x, panel.y, panel.loss))
    if xs.ndim != 1 or ys.ndim != 1 or loss.shape != (len(ys), len(xs)) or min(loss.shape) < 2:
        raise ArgumentError(
            f"The panel {panel.title!r} needs x [n], y [m] and loss [m, n] with n, m ≥ 2; it has x {xs.shape}, "
            f"y {ys.shape}, loss {loss.shape}. Evaluate the loss with rows along y and columns along x."
        )
    x = Scale(float(xs[0]), float(xs[-1]), 0, _PANEL)
    y = Scale(float(ys[0]), float(ys[-1]), _TOP + _PANEL, _TOP)
    box = f'<rect x="0" y="{_TOP}" width="{_PANEL}" height="{_PANEL}"/>'
    parts = [f'<defs><clipPath id="clip-{name}">{box}</clipPath></defs>']
    drawn = _contours(xs, ys, loss, levels, x, y)
    if minimum is not None:
        drawn += svg.marker(x(minimum[0]), y(minimum[1]), "circle", "ring", 6)
    drawn += "".join(_path(path, k, len(panel.paths), x, y) for k, path in enumerate(panel.paths))
    parts.append(f'<g clip-path="url(#clip-{name})">{drawn}</g>')
    # The frame's grid would compete with the contours: only its ticks and labels are wanted.
    axes = frame(x, y, panel.x_label, "")
    parts.append(axes.replace('class="grid"', 'class="grid" opacity="0"'))
    parts.append(f'<rect x="0" y="{_TOP}" width="{_PANEL}" height="{_PANEL}" class="frame"/>')
    parts.append(svg.text(-8, _TOP - 8, panel.y_label, "axis", "end"))
    parts.append(svg.text(0, 20, panel.title, "panel-title"))
    parts.append(_legend(panel.paths))
    return "".join(parts)


def _legend(paths: Sequence[Trajectory]) -> str:
    parts, at = [], 0.0
    for k, path in enumerate(paths):
        inner = svg.polyline([(at, 40), (at + 24, 40)], "series", path.dash)
        inner += svg.marker(at + 12, 40, path.marker, "dot", 3.4) + svg.text(at + 30, 44, path.label, "name")
        parts.append(coloured(Style(k, path.slot, path.dash, path.marker), inner))
        at += 46 + svg.text_width(path.label, 11.5, bold=True)
    return "".join(parts)


def _path(path: Trajectory, index: int, count: int, x: Scale, y: Scale) -> str:
    points = np.asarray(path.points, dtype=float)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ArgumentError(f"The path {path.label!r} has shape {points.shape}; give an array [steps, 2].")
    pixels = [(x(float(u)), y(float(v))) for u, v in points if np.isfinite(u) and np.isfinite(v)]
    if not pixels:
        return ""
    rank = index / (count - 1) if count > 1 else 1.0
    inner = ""
    if len(pixels) > 1:
        line = svg.polyline(pixels, "series", path.dash)
        inner = f'<g style="stroke-width:{5 - 3.2 * rank:.1f}px;opacity:{0.5 + 0.5 * rank:.2f}">{line}</g>'
    kept, last = [pixels[0]], pixels[0]
    for px, py in pixels[1:]:
        # Markers closer than their size would only smear.
        if (px - last[0]) ** 2 + (py - last[1]) ** 2 > 13.0**2:
            kept.append((px, py))
            last = (px, py)
    inner += "".join(svg.marker(px, py, path.marker, "dot", 5.4 - 2.6 * rank) for px, py in kept)
    return coloured(Style(index, path.slot, path.dash, path.marker), inner)


def _contours(xs: np.ndarray, ys: np.ndarray, loss: np.ndarray, levels: int, x: Scale, y: Scale) -> str:
    """Stacked translucent sublevel sets, darker towards the minimum, and their outlines."""
    finite = loss[np.isfinite(loss)]
    if finite.size == 0 or finite.max() <= finite.min():
        return ""
    low = float(finite.min())
    masked = np.ma.masked_invalid(loss)
    generator = _contourpy().contour_generator(xs, ys, masked, fill_type="OuterOffset")
    parts = []
    for fraction in np.linspace(0, 1, levels + 2)[1:-1]:
        # The exponent crowds the levels a little towards the minimum.
        level = float(np.quantile(finite, float(fraction) ** 1.4))
        if level <= low:
            continue
        points, offsets = generator.filled(low - 1.0 - abs(low), level)
        for vertices, starts in zip(points, offsets, strict=True):
            rings = [vertices[a:b] for a, b in itertools.pairwise(starts)]
            d = "".join("M" + "L".join(f"{x(u):.1f} {y(v):.1f}" for u, v in ring) + "Z" for ring in rings)
            parts.append(f'<path d="{d}" class="level" fill-rule="evenodd"/>')
        for ring in generator.lines(level):
            parts.append(svg.polyline([(x(float(u)), y(float(v))) for u, v in ring], "contour"))
    return "".join(parts)


def _contourpy() -> Any:
    try:
        import contourpy
    except ImportError as error:
        raise MissingExtraError(
            "Drawing loss contours needs contourpy (it comes with matplotlib), which is not installed. "
            "Install it with: pip install natgrad[report]"
        ) from error
    return contourpy
