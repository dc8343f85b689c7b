"""How far a search is, on stderr, where that is a terminal and the search takes longer than a second."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Bar"]

PATIENCE = 1.0
"""Seconds without a bar."""


class Bar:
    """Is told how much of how much is done. It starts no thread: a process with threads must not be copied."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, number: int, of: int) -> None:
        """Draw ``number`` of ``of``."""
        if self._progress is None:
            if not sys.stderr.isatty() or time.monotonic() - self._start < PATIENCE:
                return
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._progress.start()
            self._progress.add_task(self._what)
        self._progress.update(self._progress.task_ids[0], completed=number, total=of, refresh=True)
