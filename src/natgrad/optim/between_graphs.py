"""Where a graph of the compiler ends so that an observer may look: imported only where something is compiled."""

from __future__ import annotations

from typing import Any

import torch


def _run(hook: Any, *call: Any) -> None:
    hook.run(*call, compiled=True)


run: Any = torch.compiler.disable(
    _run,
    reason="natgrad watches training passes of this model, which ends a graph where the model is called and where it "
    "returns. With fullgraph=True give the optimizer what torch.compile(model) returned, not the model inside.",
)
