"""Charts put the data where they belong, and the looks stay apart."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import report_samples as samples
from hypothesis import given
from hypothesis import strategies as st

from natgrad.errors import ArgumentError
from natgrad.report import drawing, figures, series, svg, theme
from natgrad.report.figures import Bar, Cloud, Curve, Interval, Panel, Trajectory

LOOK = figures.styles(["kfac"])["kfac"]


def path_of(body: str, cls: str) -> list[tuple[float, float]]:
    """Points of the first path with this class."""
    found = re.search(rf'<path d="M([^"]*?)Z?" class="{cls}"', body)
    assert found, cls
    return [tuple(float(v) for v in pair.split()) for pair in found[1].split("L")]  # type: ignore[misc]


def test_linear_axes_are_linear_and_point_up() -> None:
    figure = figures.lines("n", "T", [Curve("kfac", LOOK, [0, 1, 2], [5.0, 7.0, 9.0])], x_label="x", y_label="y")
    (x0, y0), (x1, y1), (x2, y2) = path_of(figure.body, "series")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert x0 < x1
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    assert y0 > y1


def test_logarithmic_axes_turn_ratios_into_distances() -> None:
    curve = Curve("kfac", LOOK, [1, 10, 100], [1e-3, 1e-1, 1e1])
    figure = figures.lines("n", "T", [curve], x_label="x", y_label="y", log_x=True, log_y=True)
    (x0, y0), (x1, y1), (x2, y2) = path_of(figure.body, "series")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)


@pytest.mark.parametrize(("heights", "side"), [([1.0, 1.0, 5.0], "start"), ([5.0, 1.0, 1.0], "end")])
def test_the_name_of_the_target_avoids_the_curve(heights: list[float], side: str) -> None:
    curve = Curve("kfac", LOOK, [0, 1, 2], heights)
    body = figures.lines("n", "T", [curve], x_label="x", y_label="y", reference=(4.5, "target")).body
    found = re.search(r'text-anchor="(\w+)">target<', body)
    assert found
    assert found[1] == side


def test_zero_has_a_place_on_an_offset_logarithmic_axis() -> None:
    scale = svg.Scale(0, 999, 0, 300, True, 1.0)
    assert [scale(v) for v in (0, 9, 99, 999)] == pytest.approx([0, 100, 200, 300])
    assert scale.ticks()[0] == 0.0


def test_band_encloses_the_line() -> None:
    curve = Curve("kfac", LOOK, [0, 1], [2.0, 3.0], [1.0, 2.5], [4.0, 3.5])
    body = figures.lines("n", "T", [curve], x_label="x", y_label="y").body
    band, line = path_of(body, "band"), path_of(body, "series")
    upper, lower = band[:2], band[:1:-1]
    for k in range(2):
        assert upper[k][1] < line[k][1] < lower[k][1]


def test_bars_are_proportional_and_unreached_rows_have_none() -> None:
    rows = [Bar("a", LOOK, 10.0, (8.0, 12.0)), Bar("b", LOOK, 5.0), Bar("c", LOOK, None, note="not reached")]
    body = figures.bars("n", "T", rows, x_label="steps").body
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="[\d.]+" rx="2" class="bar"', body)]
    assert len(widths) == 2
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.11)
    assert "not reached" in body
    assert len(re.findall(r'class="seed"', body)) == 2


def test_interval_order_and_reference() -> None:
    row = Interval("a", LOOK, 2.0, 3.0, 4.0, 3.5)
    body = figures.intervals("n", "T", [row], x_label="ratio", one="sgd").body
    low, high = (float(v) for v in re.search(r'x1="([\d.]+)" x2="([\d.]+)"[^>]*class="whisker"', body).groups())  # type: ignore[union-attr]
    middle = float(re.search(r'<circle cx="([\d.]+)"', body)[1])  # type: ignore[index]
    assert middle == pytest.approx((low + high) / 2, abs=0.11)
    one = float(re.search(r'x1="([\d.]+)"[^>]*class="reference"', body)[1])  # type: ignore[index]
    assert one == pytest.approx(low - (high - low) / 2, abs=0.2)


def test_scatter_puts_equal_values_on_the_diagonal() -> None:
    body = figures.scatter("n", "T", [Cloud("a", LOOK, [1e-4, 1e-2], [1e-4, 1e-2])], x_label="x", y_label="y").body
    found = re.search(r'x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)" class="reference"', body)
    assert found
    x1, y1, x2, y2 = (float(v) for v in found.groups())
    points = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="2.4"', body)
    assert len(points) == 2
    for px, py in points:
        assert float(py) == pytest.approx(y1 + (float(px) - x1) * (y2 - y1) / (x2 - x1), abs=0.2)


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_charts_without_data_say_so(values: list[float]) -> None:
    empty = figures.lines("n", "T", [Curve("a", LOOK, values, values)], x_label="x", y_label="y")
    assert empty.empty
    assert "No finite values" in empty.body
    assert figures.scatter("n", "T", [Cloud("a", LOOK, values, values)], x_label="x", y_label="y").empty


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_linear_ticks_lie_inside_and_are_even(low: float, width: float) -> None:
    ticks = svg.linear_ticks(low, low + width)
    if low + width > low + abs(low) * 1e-6:
        assert 2 <= len(ticks) <= 8
        assert all(low - width * 1e-6 <= t <= low + width * (1 + 1e-6) for t in ticks)
        gaps = np.diff(ticks)
        assert gaps == pytest.approx(np.full(len(gaps), gaps[0]), rel=1e-3)


@given(st.floats(1e-12, 1e9), st.floats(1.05, 1e9))
def test_log_ticks_lie_inside(low: float, ratio: float) -> None:
    ticks = svg.log_ticks(low, low * ratio)
    assert 1 <= len(ticks) <= 8
    assert all(low * 0.99 <= t <= low * ratio * 1.01 for t in ticks)


@pytest.mark.parametrize(("value", "expected"), [
    (0.0, "0"), (1.0, "1.00"), (0.99996, "1.00"), (1234.0, "1\u202f234"), (-0.5, "−0.500"), (3.2e-7, "3.20×10⁻⁷"),
    (None, "–"), (math.nan, "–"), (math.inf, "–"),
])  # fmt: skip
def test_number(value: float | None, expected: str) -> None:
    assert svg.number(value) == expected


@given(st.lists(st.floats(0, 200), min_size=1, max_size=14))
def test_spread_keeps_labels_apart_and_inside(wanted: list[float]) -> None:
    placed = drawing.spread(wanted, 13.5, 0.0, 200.0)
    gap = min(13.5, 200.0 / max(len(wanted) - 1, 1))
    assert all(-1e-6 <= p <= 200 + 1e-6 for p in placed)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(sorted(placed)))
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    assert order == sorted(range(len(wanted)), key=lambda k: placed[k])


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson's OKLab, from linear sRGB."""
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
              [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
              [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ np.clip(rgb, 0, 1))


# Machado, Oliveira & Fernandes 2009, severity 1.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("palette", [theme.LIGHT, theme.DARK])
def test_hues_stay_apart_for_colour_blind_readers(palette: tuple[str, ...], deficiency: str) -> None:
    seen = [oklab(DEFICIENCIES[deficiency] @ linear(c)) for c in palette]
    # 0.02 is about one just noticeable difference in OKLab.
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 0.04


@pytest.mark.parametrize(("palette", "paper"), [(theme.LIGHT, theme.LIGHT_PAPER), (theme.DARK, theme.DARK_PAPER)])
def test_hues_stand_out_from_the_paper(palette: tuple[str, ...], paper: str) -> None:
    def luminance(colour: str) -> float:
        return float(linear(colour) @ [0.2126, 0.7152, 0.0722])

    for colour in palette:
        light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3.0, colour


def test_no_two_optimizers_look_alike() -> None:
    names = list(samples.PROFILES) + [f"own-{k}" for k in range(12)]
    natural = {name: k % 2 == 0 for k, name in enumerate(names)}
    looks = figures.styles(names, natural)
    assert len({(s.slot, s.dash) for s in looks.values()}) == len(names)
    few = figures.styles(names[:8], natural)
    assert len({s.slot for s in few.values()}) == 8
    assert figures.styles(["sgd", "kfac"])["kfac"].slot == figures.styles(["kfac", "muon", "adamw"])["kfac"].slot


def test_band_is_median_and_range_where_all_seeds_have_data() -> None:
    seeds = [([0.0, 2.0, 4.0], [0.0, 2.0, 4.0]), ([0.0, 4.0], [10.0, 10.0]), ([1.0, 3.0], [1.0, 1.0])]
    band = series.band(seeds)
    assert band.x == (1.0, 2.0, 3.0)
    assert band.middle == pytest.approx((1.0, 2.0, 3.0))
    assert band.low == pytest.approx((1.0, 1.0, 1.0))
    assert band.high == pytest.approx((10.0, 10.0, 10.0))
    assert math.isnan(band.at(0.5))
    assert band.at(1.5) == pytest.approx(1.5)


def test_band_of_seeds_without_common_range_is_empty() -> None:
    assert series.band([([0.0, 1.0], [1.0, 1.0]), ([2.0, 3.0], [1.0, 1.0])]) == series.Band()
    assert series.band([([0.0], [math.nan])]) == series.Band()


def test_windows_are_medians_of_consecutive_steps() -> None:
    steps, medians = series.windows([1.0, 9.0, 2.0, 4.0, math.nan, 6.0], count=2)
    assert steps == [2.0, 5.0]
    assert medians == [2.0, 5.0]
    assert series.windows([7.0, math.nan, 8.0]) == ([1.0, 3.0], [7.0, 8.0])


def test_arrivals_agree_with_the_summary() -> None:
    comparison = samples.comparison()
    for row in comparison.summary:
        found = [series.arrival(run, 0.12) for run in comparison.runs_of(row.optimizer)]
        assert float(np.median([a[0] for a in found])) == row.steps_to_target
        assert float(np.median([a[1] for a in found])) == pytest.approx(row.seconds_to_target)


def test_early_change_asks_for_a_logarithmic_axis() -> None:
    x = [float(k) for k in range(100)]
    assert series.early([(x, [math.exp(-k) for k in x])])
    assert not series.early([(x, [100.0 - k for k in x])])


def bowl() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = np.linspace(-2, 2, 31), np.linspace(-1, 3, 41)
    return x, y, x[None, :] ** 2 + 4 * y[:, None] ** 2


def test_trajectories_draw_equal_paths_on_each_other(tmp_path: Path) -> None:
    pytest.importorskip("contourpy")
    x, y, loss = bowl()
    path = np.array([[-1.5, 2.0], [-1.0, 1.0], [0.0, 0.0]])
    other = path * [1.0, 0.5]
    panels = [
        Panel("gradient descent", x, y, loss, [Trajectory("A", path), Trajectory("B", other, 1)]),
        Panel("natural gradient", x, y, loss, [Trajectory("A", path), Trajectory("B", path.copy(), 1)]),
    ]
    figure = figures.trajectories(panels, title="Invariance", minimum=(0.0, 0.0))
    document = figure.save(tmp_path / "t.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(document)
    assert root.find("{http://www.w3.org/2000/svg}title").text == "Invariance"  # type: ignore[union-attr]
    assert "prefers-color-scheme:dark" in document
    drawn = re.findall(r'<path d="(M[^"]*)" class="series"', figure.body)
    paths = [d for d in drawn if d.count("L") == 2]
    assert len(paths) == 4
    assert paths[2] == paths[3]
    assert paths[0] != paths[1]
    assert figure.body.count('class="contour"') >= 20


def test_contours_follow_the_loss() -> None:
    """Every outline of x² + 4y² is an ellipse around the marked minimum with axes 2 : 1."""
    pytest.importorskip("contourpy")
    x, y, loss = bowl()
    body = figures.trajectories([Panel("p", x, y, loss)], title="T", minimum=(0.0, 0.0)).body
    cx, cy = (float(v) for v in re.search(r'cx="([\d.]+)" cy="([\d.]+)" r="6"', body).groups())  # type: ignore[union-attr]
    ring = path_of(body, "contour")
    width = max(px for px, _ in ring) - min(px for px, _ in ring)
    height = max(py for _, py in ring) - min(py for _, py in ring)
    assert width / height == pytest.approx(2.0, rel=0.1)
    assert sum(px for px, _ in ring) / len(ring) == pytest.approx(cx, abs=2)
    assert sum(py for _, py in ring) / len(ring) == pytest.approx(cy, abs=2)


def test_trajectories_name_what_is_wrong() -> None:
    x, y, loss = bowl()
    with pytest.raises(ArgumentError, match=r"\(31, 41\)"):
        figures.trajectories([Panel("p", x, y, loss.T)], title="T")
    with pytest.raises(ArgumentError, match=r"'A' has shape \(3,\)"):
        figures.trajectories([Panel("p", x, y, loss, [Trajectory("A", np.zeros(3))])], title="T")
    with pytest.raises(ArgumentError, match="no panel"):
        figures.trajectories([], title="T")
