"""Fails when a relative link in a Markdown file of this repository points to nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SKIPPED = {".venv", ".git", "node_modules", "runs"}


def broken_links(root: Path) -> list[str]:
    """Lines `file: link` for each relative link whose target does not exist."""
    found = []
    for page in sorted(root.rglob("*.md")):
        if SKIPPED & set(page.relative_to(root).parts):
            continue
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            path = link.split("#")[0]
            if path and "://" not in path and not path.startswith("mailto:") and not (page.parent / path).exists():
                found.append(f"{page.relative_to(root)}: {link}")
    return found


if __name__ == "__main__":
    broken = broken_links(Path(__file__).resolve().parent.parent)
    print("\n".join(broken) or "All relative links resolve.")
    sys.exit(bool(broken))
