"""The ``natgrad`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point: runs the command line, or names the extra that it needs."""
    try:
        from natgrad.cli.app import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich", "click"}:
            raise
        print(
            f"natgrad: the command line needs {error.name}, which is not installed. Install the extra: "
            "pip install 'natgrad[cli]'.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app()
