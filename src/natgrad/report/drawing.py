"""A picture as a value, and the frame (axes, grid, labels) that the chart kinds share."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from natgrad.report import svg, theme
from natgrad.report.svg import Scale

WIDTH, HEIGHT = 440, 312


@dataclass(frozen=True)
class Figure:
    """One picture: ``body`` is the inside of an ``<svg>`` of ``width`` × ``height`` user units.

    ``name`` identifies it in a page (letters, digits and hyphens), ``description`` is its text alternative, ``caption``
    says what it shows, ``reading`` how to read it.
    """

    name: str
    title: str
    body: str
    description: str = ""
    caption: str = ""
    reading: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    empty: bool = False

    def worded(self, caption: str, reading: str = "") -> Figure:
        """The same picture with these words; the caption is its text alternative unless it has one."""
        return replace(self, caption=caption, reading=reading, description=self.description or caption)

    def inline(self) -> str:
        """An ``<svg>`` element for a page that has the theme's style sheet."""
        label = svg.attribute(f"{self.title}. {self.description}".strip())
        head = f'<svg xmlns="{svg.NAMESPACE}" class="figure" role="img" aria-label={label}'
        return f'{head} viewBox="0 0 {self.width} {self.height}">{self.body}</svg>'

    def standalone(self) -> str:
        """A complete SVG document that carries its style and follows the reader's light or dark scheme."""
        style = theme.variables("svg.figure") + theme.drawing_css()
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        title = f"<title>{svg.escape(self.title)}</title><desc>{svg.escape(self.description)}</desc>"
        paper = f'<rect width="{self.width}" height="{self.height}" rx="10" style="fill:var(--paper)"/>'
        head = f'<svg xmlns="{svg.NAMESPACE}" class="figure" role="img" {size}>'
        return f"{head}{title}<style>{style}</style>{paper}{self.body}</svg>\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the standalone SVG document and returns its path."""
        target = Path(path)
        target.write_text(self.standalone(), encoding="utf-8")
        return target


def empty(name: str, title: str, reason: str, *, width: int = WIDTH, height: int = 120) -> Figure:
    """A placeholder that says why there is nothing to draw."""
    lines = wrap(reason, 62)
    top = height / 2 - 8 * (len(lines) - 1)
    body = "".join(svg.text(width / 2, top + 17 * k, words, "empty", "middle") for k, words in enumerate(lines))
    return Figure(name, title, body, reason, width=width, height=height, empty=True)


def wrap(words: str, width: int) -> list[str]:
    """Lines of at most about ``width`` characters."""
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def frame(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    """Grid, tick labels and axis labels of a rectangular plot; y runs from y.start (bottom) up to y.end (top)."""
    parts = []
    labels = [(value, svg.tick_label(value, y.log)) for value in y.ticks(5)]
    for value, words in labels:
        parts.append(svg.line(x.start, y(value), x.end, y(value), "grid"))
        parts.append(svg.text(x.start - 6, y(value) + 4, words, "tick", "end"))
    last_right = -1e9
    for value in x.ticks(6):
        words = svg.tick_label(value, x.log)
        half = svg.text_width(words, 11) / 2
        if x(value) - half < last_right + 4:
            continue
        last_right = x(value) + half
        parts.append(svg.line(x(value), y.start, x(value), y.start + 4, "frame"))
        parts.append(svg.text(x(value), y.start + 17, words, "tick", "middle"))
    parts.append(svg.line(x.start, y.start, x.end, y.start, "frame"))
    parts.append(svg.text((x.start + x.end) / 2, y.start + 35, x_label, "axis", "middle"))
    parts.append(svg.text(8, y.end - 12, y_label, "axis", "start"))
    return "".join(parts)


def coloured(style: theme.Style, inner: str) -> str:
    """A group in the colour of one optimizer; the class lets a page fade it in and out."""
    return f'<g class="o{style.index}" style="--c:var(--s{style.slot})">{inner}</g>'


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near ``wanted`` (same order of entries) that keep ``gap`` apart and stay in [low, high] if they fit."""
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    placed: list[float] = []
    for rank, k in enumerate(order):
        floor = placed[-1] + gap if placed else low
        placed.append(max(min(wanted[k], high - gap * (len(order) - 1 - rank)), floor))
    # A second pass from the far side lets a pushed cluster settle around its middle instead of drifting one way.
    settled = placed[:]
    ceiling = high
    for rank in reversed(range(len(order))):
        target = min((wanted[order[rank]] + placed[rank]) / 2, ceiling)
        settled[rank] = max(target, low + gap * rank)
        ceiling = settled[rank] - gap
    result = [0.0] * len(wanted)
    for rank, k in enumerate(order):
        result[k] = settled[rank]
    return result
