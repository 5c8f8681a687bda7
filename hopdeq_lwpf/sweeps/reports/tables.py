"""Tables of trials and of results as files: CSV, Parquet, LaTeX, Markdown."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hopdeq_lwpf.data import replacing
from hopdeq_lwpf.sweeps.reports.summary import Grid

PARQUET = "results.parquet"
WORDS = {"\\": "textbackslash", "<": "textless", ">": "textgreater", "|": "textbar"}
ESCAPES = {
    **{c: rf"\{name}{{}}" for c, name in WORDS.items()},
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\~{}",
    "^": r"\^{}",
}

Row = Mapping[str, Any]  # by column; a number that is not known is absent or None


def write_rows(rows: Sequence[Row], columns: Mapping[str, type], folder: Path) -> None:
    """results.csv, and the same as results.parquet where pyarrow is installed; one row a trial.

    columns: their types, str, int or float.
    """
    with (
        replacing(folder / "results.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    if not parquet_note():
        _write_parquet(rows, columns, folder / PARQUET)


def parquet_note() -> str:
    """Why there is no results.parquet and what to do; empty where there is one."""
    if importlib.util.find_spec("pyarrow") is not None:
        return ""
    return f"No {PARQUET}: pyarrow is not installed (pip install 'hopdeq-lwpf[parquet]'); results.csv has the same."


def _write_parquet(rows: Sequence[Row], columns: Mapping[str, type], path: Path) -> None:
    # By name, since the type checker need not have it.
    pa, pq = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    arrays = {name: pa.array([row.get(name) for row in rows], kinds[kind]) for name, kind in columns.items()}
    with replacing(path) as temporary:
        pq.write_table(pa.table(arrays), temporary)


def markdown_table(grid: Grid) -> str:
    """A table for a page of documentation."""
    lines = [grid.header, tuple("---" for _ in grid.header), *grid.lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def latex(grid: Grid) -> str:
    """A table as a LaTeX tabular, with the rules of booktabs."""

    def plain(line: tuple[str, ...]) -> str:
        cells = ["".join(ESCAPES.get(c, c) for c in cell) for cell in line]
        # A bracket after the end of a row would be taken for its option.
        return "{}" * cells[0].startswith("[") + " & ".join(cells) + r" \\"

    body = [plain(grid.header), r"\midrule", *(plain(line) for line in grid.lines)]
    columns = "l" + "r" * (len(grid.header) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"
