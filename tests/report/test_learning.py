"""The page of `natgrad rl`: sentences against counted numbers, pictures against the records, files that embed."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import report_samples as samples

from natgrad.errors import ArgumentError
from natgrad.report import write_learning
from natgrad.report.learned import Episodes, Film, Learning, Radius, SeedRun
from natgrad.report.learning import rows, summary
from natgrad.report.learning_pictures import kl_sentence, pictures, pooled, search_sentence, seed_curve
from natgrad.report.svg import NAMESPACE
from natgrad.report.theme import styles

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f6"
    "45400000000049454e44ae426082"
)


def record(update: int, seed: int) -> dict[str, float]:
    steps = 100.0 * (update + 1)
    return {
        "update": update + 1.0,
        "steps": steps,
        "return": math.nan if update == 0 else 10.0 * update + seed,
        "kl": 0.008 + 0.0001 * update + 0.0002 * seed,
        "kl_normaliser": 1e-4 / (update + 1),
        "entropy": 0.7 - 0.05 * update - 0.01 * seed,
        "explained_variance": 1 - 2.0 / (update + 1),
        "backtracks": float(update == 3),
        "accepted": float(not (update == 4 and seed == 1)),
        "seconds": steps / 500,
    }


def learning(seeds: int = 3, updates: int = 10, **changes) -> Learning:
    runs = tuple(
        SeedRun(
            seed,
            tuple(record(update, seed) for update in range(updates)),
            Episodes((100.0 + 10 * seed, 120.0 + 10 * seed), (50, 60)),
        )
        for seed in range(seeds)
    )
    made = Learning(
        "CartPole-v1", "trpo", 1000, tuple(range(seeds)), runs, samples.MACHINE, "natgrad rl CartPole-v1",
        (("max_kl", "0.01"),), (("gamma", "0.99"),), "defaults of trpo", Radius("max_kl", 0.01, True),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def figure(found: Learning, name: str):
    return next(f for f in pictures(found) if f.name == name)


def test_json_keeps_every_record_and_nan_is_null(tmp_path):
    made = learning(film=Film(1, "film.png", "film.webp", 50, 110.0, True))
    text = made.save(tmp_path / "learning.json").read_text()
    assert "NaN" not in text
    found = Learning.load(tmp_path / "learning.json")
    assert math.isnan(found.runs[0].records[0]["return"])
    assert found.runs[2].records[1:] == made.runs[2].records[1:]
    assert dataclasses.replace(found, runs=()) == dataclasses.replace(made, runs=())
    (tmp_path / "other.json").write_text('{"format": 1}')
    with pytest.raises(ArgumentError, match="natgrad rl"):
        Learning.load(tmp_path / "other.json")


def test_the_median_seed_and_all_seeds_are_drawn():
    curve = seed_curve(learning(), "return")
    assert curve.x == tuple(100.0 * k for k in range(2, 11))
    assert curve.middle == tuple(10.0 * k + 1 for k in range(1, 10))
    assert [y[-1] for _, y in curve.seeds] == [90.0, 91.0, 92.0]
    body = figure(learning(), "return").body
    assert body.count('class="thin"') == 3 and body.count('class="series"') == 1
    assert 'class="thin"' not in figure(learning(seeds=1), "return").body


def test_a_failed_seed_is_drawn_with_a_cross_and_left_out_of_the_median():
    made = learning()
    broken = dataclasses.replace(made.runs[2], records=made.runs[2].records[:4], failure="it broke", evaluation=None)
    found = dataclasses.replace(made, runs=(*made.runs[:2], broken))
    curve = seed_curve(found, "return")
    assert curve.middle == tuple(10.0 * k + 0.5 for k in range(1, 10))
    assert "a run failed here" in figure(found, "return").body
    assert "(median of 2 seeds, which end between 90.0 and 91.0)" in figure(found, "return").caption
    assert "1 of 3 seeds failed; the reasons are below." in summary(found)


def test_no_update_is_hidden_by_the_windows():
    made = learning(seeds=2, updates=1000)
    records = list(made.runs[1].records)
    records[637] = {**records[637], "kl": 5.0}
    spiked = dataclasses.replace(made, runs=(made.runs[0], dataclasses.replace(made.runs[1], records=tuple(records))))
    curve = pooled(spiked, lambda run: run.column("kl"), "trpo", styles(["trpo"])["trpo"])
    assert max(curve.high) == 5.0 and len(curve.x) <= 80
    assert (
        "1 of 2\u202f000 updates exceeded"
        in figure(dataclasses.replace(spiked, radius=Radius("max_kl", 1.0, True)), "kl").caption
    )


def test_sentences_count():
    kl = np.array([0.004, 0.009, 0.011])
    assert kl_sentence(kl, 0.02, True).startswith(
        "None of 3 updates exceeded the radius 0.02: the largest KL was 0.0110"
    )
    assert kl_sentence(kl, 0.01, True).startswith("1 of 3 updates exceeded the radius 0.01")
    assert "0.01 were aimed at; 1 went further, the largest 0.0110" in kl_sentence(kl, 0.01, False)
    updates = [r for run in learning().runs for r in run.records]
    assert search_sentence(updates) == "3 of 30 steps were halved (at most once), 1 refused."
    assert search_sentence([{"backtracks": 0.0, "accepted": 1.0}]) == "None of 1 steps was halved, none refused."
    assert "25 % of the ratios were clipped; a step was taken back in 1" in search_sentence(
        [{"clipped": 0.3, "kl_refused": 0.02}, {"clipped": 0.2, "kl_refused": 0.0}]
    )


def test_the_table_and_summary_agree_with_the_evaluations():
    named = dict(rows(learning()))
    assert named["seed 1"][0] == "120.0 ± 10.0" and named["seed 1"][2:4] == ["110.0", "130.0"]
    assert named["seed 1"][9] == "1" and named["seed 0"][9] == "0" and named["seed 0"][10] == "500"
    assert named["median of seeds"][0] == "120.0"
    assert summary(learning())[0].startswith("After 1\u202f000 steps the median of 3 seeds returns 120 (110 to 130)")
    assert "There is one seed only" in " ".join(summary(learning(seeds=1)))
    assert "goes on where it stopped" in " ".join(summary(learning(interrupted=True)))


@pytest.mark.parametrize("updates", [0, 1, 2, 300])
def test_pictures_are_valid_and_say_what_they_show(updates):
    for found in pictures(learning(updates=updates)):
        ET.fromstring(found.standalone())
        assert found.caption.endswith(".") and "nan" not in found.body and "inf" not in found.body


@pytest.mark.parametrize("radius", [None, Radius("target_kl", 0.01, False)])
def test_the_reference_line_is_there_where_there_is_a_radius(radius):
    body = figure(learning(radius=radius), "kl").body
    assert ('class="reference"' in body) == (radius is not None) == ("target_kl 0.01" in body)


def test_the_page_is_whole_in_itself(tmp_path):
    (tmp_path / "film.png").write_bytes(PIXEL)
    (tmp_path / "film.webp").write_bytes(b"RIFF")
    hostile = dataclasses.replace(learning().runs[0], failure="<script>alert(1)</script>")
    made = learning(film=Film(1, "film.png", "film.webp", 50, 110.0, True), runs=(hostile, *learning().runs[1:]))
    text = write_learning(made, tmp_path).read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert re.findall(r'src="(?!data:)', text) == [] and "://" not in text.replace(NAMESPACE, "")
    assert text.count("data:image/png;base64,") == 1 and text.count("data:image/webp;base64,") == 1
    assert "natgrad rl CartPole-v1" in text and 'id="kl"' in text
    (tmp_path / "film.png").unlink()
    bare = write_learning(dataclasses.replace(made, film=None, no_film="No screen here."), tmp_path).read_text("utf-8")
    assert "No screen here." in bare and "data:image/png" not in bare


def test_no_console_message_in_a_browser(tmp_path):
    browser = pytest.importorskip("test_report_browser")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no Chromium is installed")
    (tmp_path / "film.png").write_bytes(PIXEL)
    page = write_learning(learning(film=Film(1, "film.png", "film.webp", 50, 110.0, True)), Path(tmp_path))
    dom, messages = browser.browse(page, tmp_path / "profile")
    assert messages == [] and dom.count("<figure") == 7
