"""Settings of the whole process that threads hold at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class ProcessWide:
    """A setting that the first thread to enter makes, and the last to leave puts back.

    A context manager that puts back what it found is not enough: of two threads that overlap, the one that leaves last
    would put back what the other had set, and the setting would stay.

    Args:
        setting: makes the context manager of the setting; called by the first to enter.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[Any]]) -> None:
        self._setting = setting
        self._lock = threading.Lock()
        self._inside = 0
        self._held: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._held = self._setting()
                self._held.__enter__()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._held is not None:
                self._held.__exit__(None, None, None)
                self._held = None
