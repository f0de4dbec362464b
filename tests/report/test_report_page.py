"""The page of a comparison: complete, self-contained, well-formed, and saying the numbers it was given."""

from __future__ import annotations

import builtins
import dataclasses
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import report_samples as samples

import natgrad.report
from natgrad.errors import ArgumentError, MissingExtraError
from natgrad.report.comparison import COLUMNS
from natgrad.tasks.results import Comparison, OptimizerInfo

PICTURES = {
    "train-loss-steps",
    "train-loss-seconds",
    "test-loss-seconds",
    "test-metric-seconds",
    "steps-to-target",
    "seconds-to-target",
    "kl-per-update",
    "kl-predicted-measured",
    "step-cost",
    "memory",
}
VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """Checks that elements nest, and collects table cells, visible text, ids and attributes that load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.cells: dict[str, dict[str, str]] = {}
        self.row = ""
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.stack.append(tag)
        if "id" in found:
            self.ids.append(found["id"] or "")
        self.loads += [v or "" for k, v in attrs if k in ("src", "srcset", "data", "href", "xlink:href") and tag != "a"]
        if "data-optimizer" in found:
            self.row = found["data-optimizer"] or ""
            self.cells[self.row] = {}
        if "data-key" in found:
            self.cells[self.row][found["data-key"] or ""] = found["data-value"] or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.stack):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def written(comparison: Comparison, folder: Path) -> tuple[str, Page]:
    path = natgrad.report.write_comparison(comparison, folder)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def drawings(html: str) -> dict[str, ElementTree.Element]:
    """Picture name -> its parsed <svg>; parsing fails when it is not well-formed XML."""
    found = re.findall(r'<figure class="card" id="([\w-]+)">.*?(<svg .*?</svg>)', html, re.S)
    return {name: ElementTree.fromstring(text) for name, text in found}


def everything() -> Comparison:
    c = samples.comparison(tuple(samples.PROFILES), budget=4.0)
    return samples.failing(samples.failing(c, "muon", (1,)), "lbfgs")


def all_failed() -> Comparison:
    c = samples.comparison(("kfac", "adamw"), (0, 1))
    return samples.failing(samples.failing(c, "kfac", at=0), "adamw", at=0)


def nothing() -> Comparison:
    return dataclasses.replace(samples.comparison(("kfac",), (0,)), runs=(), summary=(), target=None)


def without_kl() -> Comparison:
    return samples.comparison(("lbfgs",), (0, 1))


def changed_losses(optimizer: str, change: Callable[[int, float], float]) -> Comparison:
    """The usual comparison with the evaluated losses of one optimizer ('' for all) passed through ``change``."""
    c = samples.comparison()
    runs = []
    for run in c.runs:
        if optimizer in ("", run.optimizer):
            points = [
                dataclasses.replace(
                    e,
                    train_loss=change(e.step, e.train_loss),
                    test_loss=change(e.step, e.test_loss),
                    test_metric=math.nan,
                )
                for e in run.evaluations
            ]
            run = dataclasses.replace(run, evaluations=tuple(points))
        runs.append(run)
    names = tuple(i.name for i in c.optimizers)
    return samples.assembled(names, c.settings.seeds, runs, budget=4.0, target=None, tune=True)


def diverging() -> Comparison:
    """Losses that grow to 1e12, then overflow, in runs that nobody stopped."""
    return changed_losses("sgd", lambda step, loss: 0.7 * 1.05**step if step < 600 else math.inf)


def negative_losses() -> Comparison:
    """Densities above one have negative log-likelihood losses."""
    return changed_losses("", lambda step, loss: loss - 0.4)


CASES: dict[str, Any] = {
    "usual": samples.comparison,
    "twelve optimizers, some failed": everything,
    "one optimizer, one seed, not tuned": lambda: samples.comparison(("kfac",), (0,), tune=False),
    "no target": lambda: samples.comparison(target=None),
    "target out of reach": lambda: samples.comparison(target=1e-6),
    "all failed": all_failed,
    "no run": nothing,
    "no optimizer": lambda: dataclasses.replace(nothing(), optimizers=()),
    "no KL": without_kl,
    "one diverges": diverging,
    "negative losses, no metric": negative_losses,
}


@pytest.mark.parametrize("case", CASES)
def test_page_is_complete_and_self_contained(case: str, tmp_path: Path) -> None:
    comparison = CASES[case]()
    html, page = written(comparison, tmp_path)
    pictures = drawings(html)
    assert set(pictures) == PICTURES
    for picture in pictures.values():
        assert picture.get("role") == "img"
        assert len(picture.get("aria-label", "")) > 10
    assert len(page.ids) == len(set(page.ids))
    assert page.loads == ["data:,"]
    outside = set(re.findall(r"https?://[^\s\"'<]*", html)) - {"http://www.w3.org/2000/svg"}
    assert not outside
    assert not re.findall(r"url\((?!#)|@import", html)
    assert not re.search(r"\bnan\b|\binf\b|None|Undefined", re.sub(r"became NaN", "", page.text))
    assert comparison.settings.command in page.text


def test_a_diverging_optimizer_does_not_flatten_the_others(tmp_path: Path) -> None:
    html, page = written(diverging(), tmp_path)
    assert "are cut off" in page.text
    assert "sgd ended without a finite loss." in page.text
    assert "not reached" not in page.text
    picture = re.search(r'id="train-loss-seconds">.*?</figure>', html, re.S)
    assert picture
    kfac = re.search(r'<g class="o0"[^>]*><path d="M([^"]*)" class="series"', picture[0])
    assert kfac
    heights = [float(pair.split()[1]) for pair in kfac[1].split("L")]
    assert max(heights) - min(heights) > 80


def test_negative_losses_get_a_linear_axis(tmp_path: Path) -> None:
    html, page = written(negative_losses(), tmp_path)
    assert "mean loss per prediction (nats)" in page.text
    assert "No run has a finite squared error" in html


def test_every_svg_has_numbers_inside_its_own_box(tmp_path: Path) -> None:
    html, _ = written(everything(), tmp_path)
    for name, picture in drawings(html).items():
        width, height = (float(v) for v in picture.get("viewBox", "").split()[2:])
        for element in picture.iter():
            if element.tag.endswith("}text"):
                assert 0 <= float(element.get("x", "0")) <= width, (name, element.text)
                assert 0 <= float(element.get("y", "0")) <= height, (name, element.text)


def test_table_carries_the_numbers_of_the_summary(tmp_path: Path) -> None:
    comparison = everything()
    _, page = written(comparison, tmp_path)
    assert list(page.cells) == [row.optimizer for row in comparison.summary]
    for row in comparison.summary:
        cells = page.cells[row.optimizer]
        assert set(cells) == {column.key for column in COLUMNS}
        assert cells.pop("runs") == str(row.runs - row.failed)
        for key, shown in cells.items():
            expected = getattr(row, key)
            assert (float(shown) if shown else None) == expected, (row.optimizer, key)


def test_json_holds_every_number(tmp_path: Path) -> None:
    comparison = everything()
    written(comparison, tmp_path)
    data = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert data["runs"][0]["train_loss"] == list(comparison.runs[0].train_loss)
    assert Comparison.load(tmp_path / "comparison.json").to_json() == comparison.to_json()


def test_failures_are_listed_with_reasons(tmp_path: Path) -> None:
    comparison = samples.failing(samples.comparison(tune=False), "sgd", (2,), at=7)
    _, page = written(comparison, tmp_path)
    assert "sgd, seed 2, lr 0.1, after 7 steps: the loss became NaN at step 7" in page.text


def test_learning_rate_grid_shows_losses_and_the_choice(tmp_path: Path) -> None:
    html, page = written(samples.comparison(("kfac",)), tmp_path)
    assert "0.01 0.4303" in page.text.replace("0.010.4303", "0.01 0.4303")
    assert len(re.findall(r'<td class="chosen"><small>0\.1</small>0\.2000', html)) == 1
    assert re.search(r'title="the loss became NaN at step 12"><small>1</small>failed', html)


def test_settings_are_named_for_what_they_are(tmp_path: Path) -> None:
    """A radius of a trust region is never called a learning rate: table, grid and failures name the knob."""
    comparison = samples.failing(samples.comparison(("kfac", "sgd")), "kfac", (2,), at=7)
    html, page = written(comparison, tmp_path)
    for name, knob in (("kfac", "max_kl"), ("sgd", "lr")):
        assert re.search(rf'<tr data-optimizer="{name}">.*?<td data-key="lr" data-value="0.1">{knob} 0\.1<', html, re.S)
        assert re.search(rf'<th scope="row"><svg [^\n]*</svg>{name} <code>{knob}</code></th>', html)
    assert "kfac, seed 2, max_kl 0.1, after 7 steps" in page.text
    assert "kfac, trial of max_kl 1, seed 0" in page.text and "sgd, trial of lr 1, seed 0" in page.text
    plain, page = written(samples.comparison(("kfac",), tune=False), tmp_path)
    assert "default setting (learning rate lr, or trust-region radius max_kl)" in page.text
    assert "default learning rate" not in plain + html


def test_same_colour_in_every_picture(tmp_path: Path) -> None:
    html, _ = written(samples.comparison(("kfac", "sgd", "adamw", "ekfac")), tmp_path)
    pairs = set(re.findall(r'<g class="(o\d+)" style="--c:var\(--(s\d)\)"', html))
    assert len(pairs) == 4
    assert len({slot for _, slot in pairs}) == 4


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&\x07]]>'
    c = samples.failing(samples.comparison(("kfac", "sgd"), (0,)), "sgd")
    renamed = {"kfac": evil, "sgd": "a&b"}
    c = dataclasses.replace(
        c,
        task=dataclasses.replace(c.task, name=evil, description=evil, metric=evil),
        settings=dataclasses.replace(c.settings, command=evil, tuning=None),
        optimizers=tuple(OptimizerInfo(renamed[i.name], i.family, 0.1, evil) for i in c.optimizers),
        runs=tuple(
            dataclasses.replace(r, optimizer=renamed[r.optimizer], failure=evil if r.failure else None) for r in c.runs
        ),
        summary=tuple(dataclasses.replace(r, optimizer=renamed[r.optimizer]) for r in c.summary),
    )
    html, page = written(c, tmp_path)
    assert set(drawings(html)) == PICTURES
    assert html.count("<script") == 1
    assert "alert(" in page.text


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ArgumentError, match=re.escape(str(blocked / "deeper"))):
        natgrad.report.write_comparison(samples.comparison(("sgd",), (0,)), blocked / "deeper")
    assert blocked.read_text() == "in the way"


def test_missing_jinja2_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_jinja2(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jinja2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_jinja2)
    with pytest.raises(MissingExtraError, match=r"pip install natgrad\[report\]"):
        natgrad.report.write_comparison(samples.comparison(("sgd",), (0,)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
