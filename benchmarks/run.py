"""Times natgrad beside SGD and fused AdamW: ``python benchmarks/run.py [--quick] [--only W1 ...] [--json FILE]``."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, only this folder is on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.cli import main

    raise SystemExit(main())
