"""What all pages share: templates, keys of the legend, names in their colours, the style sheet, writing to disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from natgrad.errors import ArgumentError, MissingExtraError
from natgrad.report import svg
from natgrad.report.svg import number
from natgrad.report.theme import Style
from natgrad.tasks.results import Machine


def environment() -> Any:
    """The jinja2 environment of the templates.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError(
            "Writing a report needs jinja2, which is not installed. Install it with: pip install natgrad[report]"
        ) from error
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(Path(__file__).parent / "templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["number"] = number
    return made


def write(page: str, folder: Path, name: str) -> Path:
    """Write the page into ``folder``, made if missing; returns its path.

    Raises:
        ArgumentError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error) from error
    return target


def unwritable(folder: str | os.PathLike[str], error: OSError) -> ArgumentError:
    """The error of a folder that a report cannot be written to."""
    return ArgumentError(
        f"The report cannot be written to {str(folder)!r}: {error.strerror or error}. The path may be a file, may "
        "lie in a folder without write permission, or the disk may be full. Give another folder, such as runs/new."
    )


def key(style: Style) -> str:
    """The little line and marker that stands beside a name."""
    inner = svg.polyline([(1, 7), (27, 7)], "series", style.dash) + svg.marker(14, 7, style.marker, "dot", 4)
    look = f'style="--c:var(--s{style.slot})"'
    size = 'width="28" height="14" viewBox="0 0 28 14" aria-hidden="true"'
    return f'<svg xmlns="{svg.NAMESPACE}" class="key" {size} {look}>{inner}</svg>'


def machine_facts(machine: Machine) -> list[tuple[str, str]]:
    """The machine as (name, value)."""
    return [
        ("processor", machine.cpu),
        ("cores, threads", f"{machine.cores} cores, {machine.threads} threads used"),
        ("device", machine.device),
        ("matrix product rate", f"{number(machine.gemm_gflops)} GFLOP/s (float32, same process)"),
        ("natgrad", machine.natgrad),
        ("torch", machine.torch),
        ("Python", machine.python),
        ("system", machine.platform),
    ]
