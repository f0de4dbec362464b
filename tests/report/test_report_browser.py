"""The page in a real browser, where one is installed: no console message, a working table, both colour schemes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import report_samples as samples

import natgrad.report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
    "--enable-logging=stderr",
    "--v=0",
]

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The DOM after loading, and the console messages."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    environment = os.environ | {"HOME": str(profile)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("Chromium did not answer within 60 s")
    if "<html" not in done.stdout:
        pytest.skip(f"Chromium cannot run here: {done.stderr[-300:]}")
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def with_script(page: Path, name: str, script: str) -> Path:
    changed = page.with_name(name)
    text = page.read_text(encoding="utf-8")
    changed.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return changed


def test_no_console_message_and_a_table_that_sorts(tmp_path: Path) -> None:
    comparison = samples.comparison()
    page = natgrad.report.write_comparison(comparison, tmp_path / "report")
    _, messages = browse(page, tmp_path / "profile")
    assert messages == []
    # The same check must see an error when there is one, and a request that the page's policy forbids.
    broken = with_script(page, "broken.html", "fetch('comparison.json').catch(() => 0); undefinedFunction();")
    _, messages = browse(broken, tmp_path / "profile")
    assert any("undefinedFunction" in m for m in messages)
    assert any("Content Security Policy" in m for m in messages)

    script = """
      const buttons = document.querySelectorAll("#table thead button");
      const order = () => [...document.querySelectorAll("#table tbody tr")].map(row => row.dataset.optimizer).join();
      buttons[0].click();
      document.body.dataset.name = order();
      buttons[8].click(); buttons[8].click();
      document.body.dataset.seconds = order();
      const root = document.documentElement;
      document.body.dataset.sideways = `${root.clientWidth > 1100} ${root.scrollWidth <= root.clientWidth}`;
      const wrapper = document.querySelector(".card.scroll");
      document.body.dataset.inside = wrapper.scrollWidth > wrapper.clientWidth;
    """
    dom, messages = browse(with_script(page, "sorted.html", script), tmp_path / "profile")
    assert messages == []
    assert 'data-name="adamw,kfac,sgd"' in dom
    assert 'data-sideways="true true"' in dom, "only the wrapper of a wide table scrolls sideways, never the page"
    assert 'data-inside="true"' in dom, "the table must be wider than its wrapper for this check to mean something"
    seconds = {row.optimizer: row.seconds_to_target or 0.0 for row in comparison.summary}
    slowest_first = ",".join(sorted(seconds, key=lambda name: -seconds[name]))
    assert f'data-seconds="{slowest_first}"' in dom
    assert 'aria-sort="descending"' in dom
