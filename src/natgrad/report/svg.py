"""The smallest drawing kit that the pictures need: axis scales, tick positions, number words and SVG elements as text.

Colours are never written here: elements carry classes and a ``--c`` property that the theme resolves, so one drawing
serves the light and the dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape as _escape
from xml.sax.saxutils import quoteattr

NAMESPACE = "http://www.w3.org/2000/svg"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """Maps data in [low, high] to pixels in [start, end], linearly or in the logarithm.

    With ``offset`` > 0 the logarithm is that of 1 + value / offset, so that zero has a place.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    offset: float = 0.0

    def drawable(self, value: float) -> bool:
        """Whether the value has a place on this axis."""
        return math.isfinite(value) and (not self.log or value + self.offset > 0)

    def _inner(self, value: float) -> float:
        if not self.log:
            return value
        return math.log10(value + self.offset) if value + self.offset > 0 else -math.inf

    def __call__(self, value: float) -> float:
        low, high, at = self._inner(self.low), self._inner(self.high), self._inner(value)
        fraction = (at - low) / (high - low) if high > low else 0.5
        # Far outside the frame the exact position does not matter, but renderers dislike huge coordinates.
        return self.start + min(max(fraction, -2.0), 3.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the range, about ``count`` of them."""
        if not self.log:
            return linear_ticks(self.low, self.high, count)
        if not self.offset:
            return log_ticks(self.low, self.high, count)
        start = max(self.low, self.offset)
        return [0.0] * (self.low <= 0) + (log_ticks(start, self.high, count) if self.high > start else [self.high])


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten inside [low, high]; with 2 and 5 between them when the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    inside = [10.0**k for k in range(first, last + 1) if low * 0.999 <= 10.0**k <= high * 1.001]
    if len(inside) > count:
        stride = math.ceil(len(inside) / count)
        return inside[::stride]
    if len(inside) >= 3:
        return inside
    for factors in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        dense = [m * 10.0**k for k in range(first - 1, last + 1) for m in factors]
        found = [t for t in dense if low * 0.999 <= t <= high * 1.001]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / (count + 2))]
    return linear_ticks(low, high, 3)


def padded(
    values: Iterable[float], *, log: bool, pad: float = 0.05, include: Sequence[float] = ()
) -> tuple[float, float]:
    """The range of the finite values (positive ones when ``log``), widened a little; (0, 1) or (0.1, 1) when empty."""
    kept = [v for v in (*values, *include) if math.isfinite(v) and (v > 0 or not log)]
    if not kept:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(kept), max(kept)
    if log:
        margin = max((high / low) ** pad, 1.12 if high > low * 1.001 else 2.0)
        return low / margin, high * margin
    margin = (high - low) * pad or max(abs(high) * 0.1, 1e-12)
    return low - margin, high + margin


def tick_label(value: float, log: bool = False) -> str:
    """A short label of a tick: 0.05, 200, 20k, 10⁻⁴."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        exponent = math.floor(math.log10(size) + 1e-9)
        mantissa = value / 10.0**exponent
        power = "10" + str(exponent).translate(_SUPERSCRIPT)
        return power if abs(mantissa - 1) < 1e-6 else f"{mantissa:.3g}×{power}"
    if size >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.6g}"


def number(value: float | None, digits: int = 3) -> str:
    """A number for prose and tables with ``digits`` significant digits; an en dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(float(f"{value:.{digits - 1}e}"))
    if 1e-4 <= size < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(size)))
        return f"{value:,.{decimals}f}".replace(",", "\u202f").replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")


def grouped(value: int) -> str:
    """An integer with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def text(x: float, y: float, words: str, cls: str = "tick", anchor: str = "start", extra: str = "") -> str:
    """A text element."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{cls}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, cls: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{cls}"/>'


def polyline(points: Iterable[tuple[float, float]], cls: str, dash: str = "") -> str:
    """An open path through the points."""
    body = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{body}" class="{cls}"{dashes}/>'


def polygon(points: Iterable[tuple[float, float]], cls: str) -> str:
    """A closed, filled path through the points."""
    return f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}Z" class="{cls}"/>'


def rectangle(x: float, y: float, width: float, height: float, cls: str, radius: float = 0, title: str = "") -> str:
    """A rectangle, with a tooltip when ``title`` is given."""
    tip = f"><title>{escape(title)}</title></rect>" if title else "/>"
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" rx="{radius:g}"'
    return f'<rect {shape} class="{cls}"{tip}'


def marker(x: float, y: float, shape: str, cls: str, size: float = 3.5, title: str = "") -> str:
    """A small symbol: circle, square, diamond, triangle, down (triangle) or cross."""
    tip = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" class="{cls}">{tip}</circle>'
    s = size * 1.15
    corners = {
        "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        "diamond": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
        "triangle": ((0, -1.1), (1.1, 0.8), (-1.1, 0.8)),
        "down": ((0, 1.1), (1.1, -0.8), (-1.1, -0.8)),
    }
    if shape == "cross":
        d = f"M{x - s:.1f} {y - s:.1f}L{x + s:.1f} {y + s:.1f}M{x - s:.1f} {y + s:.1f}L{x + s:.1f} {y - s:.1f}"
        return f'<path d="{d}" class="{cls}">{tip}</path>'
    d = "L".join(f"{x + s * u:.1f} {y + s * v:.1f}" for u, v in corners[shape])
    return f'<path d="M{d}Z" class="{cls}">{tip}</path>'


def escape(words: str) -> str:
    """Text that is safe inside an XML element; control characters that XML forbids are dropped."""
    return _escape("".join(c for c in words if c in "\t\n" or ord(c) >= 32))


def attribute(words: str) -> str:
    """A quoted, escaped attribute value."""
    return quoteattr("".join(c if ord(c) >= 32 else " " for c in words))


def text_width(words: str, size: float, *, bold: bool = False) -> float:
    """A generous guess at the width of a system sans-serif text, good enough to lay labels out."""
    widths = (0.36 if c in "iljtf.,:;|' " else 0.95 if c in "mwMW" else 0.7 if c.isupper() else 0.62 for c in words)
    return size * sum(widths) * (1.1 if bold else 1.0)
