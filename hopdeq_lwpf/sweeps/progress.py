"""Progress of a long run: a bar on a terminal, plain lines in a log file, nothing when asked to be quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[str], None]
LOG_INTERVAL = 5.0  # seconds between two lines in a log file


@contextmanager
def progress(total: int, unit: str, console: Console | None) -> Iterator[Advance]:
    """Yields a function to call after each piece of work with what was done; `console=None` shows nothing."""
    if console is None:
        yield lambda _: None
    elif console.is_terminal:
        bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(f"{unit}, [cyan]{{task.description}}[/]"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        with bar:
            task = bar.add_task("", total=total)
            yield lambda what: bar.update(task, advance=1, description=what)
    else:
        yield _Lines(total, unit, console)


class _Lines:
    """Says how far the work is, at most every few seconds and at the end."""

    def __init__(self, total: int, unit: str, console: Console) -> None:
        self.total, self.unit, self.console = total, unit, console
        self.done = 0
        self.start = self.last = time.monotonic()

    def __call__(self, what: str) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last < LOG_INTERVAL and self.done < self.total:
            return
        self.last = now
        elapsed = now - self.start
        self.console.print(
            f"{self.done} of {self.total} {self.unit}, {elapsed:.0f} s, {what}", markup=False, highlight=False
        )
