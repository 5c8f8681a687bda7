"""What the commands print: tables, sentences, paths; wide lines where no terminal says how wide it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # its module needs torch
    from hopdeq_lwpf.sweeps.reports.summary import Grid

LOG_WIDTH = 200  # columns where there is no terminal that would say


def console(*, stderr: bool = False) -> Console:
    """For results; for progress with stderr."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=LOG_WIDTH)


def say(line: str) -> None:
    """A line as it stands, however long."""
    console().print(line, markup=False, highlight=False, soft_wrap=True)


def show_all(grids: Iterable[Grid], sentences: Iterable[str], paths: Iterable[Path] = ()) -> None:
    """Tables, then sentences, then the files that were written."""
    grids, sentences, paths = list(grids), list(sentences), list(paths)
    for grid in grids:
        show(grid)
    for sentence in sentences:
        say(f"- {sentence}")
    if paths:
        say("\nwritten:" if grids or sentences else "written:")
    for path in paths:
        say(f"  {path}")


def show(grid: Grid) -> None:
    """A table with its title."""
    table = Table(title=Text(grid.title), title_justify="left", box=box.SIMPLE, show_header=any(grid.header))
    for number, name in enumerate(grid.header):
        table.add_column(Text(name), justify="left" if number == 0 else "right", no_wrap=True)
    for line in grid.lines:
        table.add_row(*(Text(cell) for cell in line))
    console().print(table)
