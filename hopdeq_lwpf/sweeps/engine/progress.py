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
def progress(
    total: int, unit: str, console: Console | None, *, every_piece: bool = False
) -> Iterator[Advance]:
    """Yields a function to call after each piece of work with what was done; `console=None` shows nothing.

    every_piece: a line for each piece, with the time left, also on a terminal: for pieces that take long.
    """
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
            lines = _Lines(total, unit, console, every_piece=True)

            def advance(what: str) -> None:
                bar.update(task, advance=1, description="" if every_piece else what)
                if every_piece:
                    lines(what)

            yield advance
    else:
        yield _Lines(total, unit, console, every_piece=every_piece)


class _Lines:
    """Says how far the work is: at most every few seconds and at the end, or after every piece with the time left."""

    def __init__(self, total: int, unit: str, console: Console, *, every_piece: bool) -> None:
        self.total, self.unit, self.console, self.every_piece = total, unit, console, every_piece
        self.done = 0
        self.start = self.last = time.monotonic()

    def __call__(self, what: str) -> None:
        self.done += 1
        now = time.monotonic()
        if not self.every_piece and now - self.last < LOG_INTERVAL and self.done < self.total:
            return
        self.last = now
        elapsed = now - self.start
        left = ""
        if self.every_piece and self.done < self.total:
            left = f" (about {elapsed / self.done * (self.total - self.done):.0f} s left)"
        line = f"{self.done} of {self.total} {self.unit}, {elapsed:.0f} s{left}, {what}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=self.every_piece)
