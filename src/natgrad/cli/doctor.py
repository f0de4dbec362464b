"""``natgrad doctor``: what this installation is made of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys

from rich.table import Table

from natgrad.cli.console import output

# Shown when the package's own metadata is not there (a source tree on the path).
_EXTRAS = {"tasks": ("scikit-learn",), "report": ("matplotlib", "jinja2"), "cli": ("typer", "rich")}


def doctor() -> None:
    """Print versions, threads, devices and which extras are installed."""
    import torch

    import natgrad
    from natgrad.tasks.measure import machine_facts

    facts = machine_facts(torch.device("cpu"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("natgrad", natgrad.__version__)
    table.add_row("python", f"{platform.python_version()} ({sys.executable})")
    for name in ("torch", "numpy", "scipy"):
        table.add_row(name, _version(name) or "[red]missing[/]")
    table.add_row("cpu", f"{facts.cpu}, {facts.cores} cores")
    table.add_row("threads", f"{facts.threads} (torch)")
    table.add_row("float32 product", f"{facts.gemm_gflops:.0f} GFLOP/s")
    table.add_row("cuda", _cuda())
    for extra, packages in extras().items():
        missing = [package for package in packages if _version(package) is None]
        found = ", ".join(f"{package} {_version(package)}" for package in packages if package not in missing)
        lacking = f"[yellow]missing {', '.join(missing)}: pip install 'natgrad\\[{extra}]'[/]" if missing else ""
        table.add_row(f"extra {extra}", "; ".join(part for part in (found, lacking) if part) or "nothing needed")
    output().print(table)


def extras() -> dict[str, tuple[str, ...]]:
    """Extra -> the packages it installs, from the installed metadata where there is any; ``dev`` is left out."""
    try:
        requirements = importlib.metadata.requires("natgrad") or []
    except importlib.metadata.PackageNotFoundError:
        return dict(_EXTRAS)
    found: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"""([\w.-]+)[^;]*;.*extra\s*==\s*['"]([\w-]+)['"]""", requirement)
        if match and match[2] != "dev":
            found.setdefault(match[2], []).append(match[1])
    return {extra: tuple(packages) for extra, packages in found.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "not available"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
