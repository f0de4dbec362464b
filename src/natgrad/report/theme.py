"""Colours, dashes and markers: every optimizer looks the same in every picture, and never by colour alone.

The eight hues differ in lightness as well, so that they stay apart under protanopia, deuteranopia and tritanopia; both
schemes keep a contrast of at least 3 : 1 to the paper. Natural-gradient optimizers are drawn with solid lines, the
others dashed; when there are more optimizers than hues, a hue returns with another dash and marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LIGHT = ("#1b49ad", "#cb3d0b", "#00695c", "#75186a", "#c48800", "#2b9ade", "#9460e4", "#868b91")
DARK = ("#5aa9ff", "#f2622c", "#22b07f", "#b44fb0", "#f0d255", "#b4e2fd", "#8a68f5", "#98a1ab")
LIGHT_PAPER, DARK_PAPER = "#ffffff", "#161a20"
MARKERS = ("circle", "square", "diamond", "triangle", "down")

# The hue that an optimizer gets when it is free, so that reports of different comparisons look alike.
_PREFERRED = {
    "kfac": 0,
    "adamw": 1,
    "sgd": 7,
    "muon": 4,
    "lbfgs": 3,
    "ekfac": 5,
    "ngd": 2,
    "trustregionngd": 6,
    "gramngd": 6,
    "hessianfree": 3,
    "blockngd": 2,
    "diagonalngd": 5,
    "gaussnewton": 4,
    "newton": 1,
}
_DASHES = {True: ("", "2 3", "7 2 1.5 2"), False: ("6 3", "3 2", "9 2 2 2")}


@dataclass(frozen=True)
class Style:
    """How one optimizer looks: ``slot`` indexes the palette, ``index`` its place in the comparison."""

    index: int
    slot: int
    dash: str
    marker: str


def styles(names: Sequence[str], natural: Mapping[str, bool] | None = None) -> dict[str, Style]:
    """One style per name; no two names share hue and dash as long as there are at most 24.

    ``natural[name]`` says whether it is a natural-gradient method (default: all are).
    """
    uses = [0] * len(LIGHT)
    chosen: dict[str, int] = {}
    by_preference = sorted(names, key=lambda name: _key(name) not in _PREFERRED)
    for name in by_preference:
        wanted = _PREFERRED.get(_key(name), 0)
        fewest = min(uses)
        order = [(wanted + k) % len(uses) for k in range(len(uses))]
        slot = next(s for s in order if uses[s] == fewest)
        uses[slot] += 1
        chosen[name] = slot
    seen: dict[tuple[int, bool], int] = {}
    result = {}
    for index, name in enumerate(names):
        solid = natural is None or natural.get(name, True)
        slot, dashes = chosen[name], _DASHES[solid]
        turn = seen.get((slot, solid), 0)
        seen[slot, solid] = turn + 1
        repeat = turn + seen.get((slot, not solid), 0)
        result[name] = Style(
            index,
            slot,
            dashes[turn % len(dashes)],
            MARKERS[(slot + 2 * (slot // len(MARKERS)) + repeat) % len(MARKERS)],
        )
    return result


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def variables(selector: str = ":root") -> str:
    """The custom properties of both colour schemes as CSS."""
    light = {"paper": LIGHT_PAPER, "page": "#f4f5f7", "ink": "#16191d", "muted": "#565d66", "grid": "#e3e6ea"}
    dark = {"paper": DARK_PAPER, "page": "#0d1014", "ink": "#eceff3", "muted": "#a3abb5", "grid": "#2b3139"}
    light |= {f"s{i}": c for i, c in enumerate(LIGHT)} | {"edge": "#d5d9df", "link": "#1b49ad", "bad": "#b3261e"}
    dark |= {f"s{i}": c for i, c in enumerate(DARK)} | {"edge": "#323943", "link": "#7db9ff", "bad": "#ff8a80"}

    def block(values: Mapping[str, str]) -> str:
        return f"{selector}{{{''.join(f'--{k}:{v};' for k, v in values.items())}}}"

    return f"{block(light)}@media (prefers-color-scheme:dark){{{block(dark)}}}"


DRAWING_CSS = """
svg.figure{display:block;width:100%;height:auto;font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
Arial,sans-serif}
svg.figure text{fill:var(--ink);font-size:11.5px}
svg.figure .tick{fill:var(--muted);font-size:11px;font-variant-numeric:tabular-nums}
svg.figure .axis{fill:var(--ink);font-size:12px}
svg.figure .panel-title{font-size:13px;font-weight:600}
svg.figure .name{font-size:11.5px;font-weight:600;fill:var(--c);fill:color-mix(in srgb,var(--c) 72%,var(--ink))}
svg.figure .note{fill:var(--muted);font-size:11px}
svg.figure .empty{fill:var(--muted);font-size:13px}
svg.figure .grid{stroke:var(--grid);stroke-width:1}
svg.figure .frame{stroke:var(--muted);stroke-width:1;fill:none}
svg.figure .reference{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:3 3;fill:none;opacity:.75}
svg.figure .leader{stroke:var(--c);stroke-width:.8;opacity:.6;fill:none}
svg.figure .far{opacity:.4;stroke-dasharray:1 2}
svg.figure{stroke-width:2}
svg.figure .series{stroke:var(--c);fill:none;stroke-linejoin:round;stroke-linecap:butt}
svg.figure .thin{stroke:var(--c);stroke-width:1;fill:none;opacity:.75}
svg.figure .band{fill:var(--c);opacity:.16;stroke:none}
svg.figure .bar{fill:var(--c);opacity:.85}
svg.figure .bar-soft{fill:var(--c);opacity:.34}
svg.figure .whisker{stroke:var(--c);stroke-width:3;opacity:.45}
svg.figure .mean{stroke:var(--c);stroke-width:2}
svg.figure .dot{fill:var(--c);stroke:var(--paper);stroke-width:1}
svg.figure .point{fill:var(--c);opacity:.5;stroke:none}
svg.figure .seed{fill:var(--paper);stroke:var(--c);stroke-width:1.5}
svg.figure .ring{fill:none;stroke:var(--ink);stroke-width:1.2}
svg.figure .fail{stroke:var(--c);stroke-width:2;fill:none}
svg.figure .halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
svg.figure .level{fill:var(--ink);opacity:.028;stroke:none}
svg.figure .contour{stroke:var(--ink);stroke-width:.7;opacity:.28;fill:none}
"""


def drawing_css() -> str:
    """The rules that every drawing needs, without line breaks."""
    return "".join(DRAWING_CSS.splitlines())
