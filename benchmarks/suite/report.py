"""The one table: shown while it is measured, then written as Markdown and JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from benchmarks.suite.row import Row

# Column of a record: what it is called in the table.
HEADINGS = {
    "group": "group",
    "what": "problem",
    "method": "method",
    "n": "N",
    "b": "B",
    "d": "d",
    "dtype": "dtype",
    "tolerance": "tolerance",
    "ms": "ms",
    "iqr": "IQR",
    "steps": "steps",
    "evaluations": "evaluations",
    "products": "products",
    "floor_ms": "floor, ms",
    "overhead": "overhead",
    "step_us": "us a step over f",
    "relative": "relative",
    "residual": "worst residual",
    "elsewhere": "elsewhere",
    "gradient_error": "gradient error",
    "peak_mb": "peak, MB",
    "target": "target",
    "note": "note",
}
LEGEND = """\
ms, IQR: median and interquartile range of calls; without IQR it is that of one call, which took over 2 seconds, or of a
peer that left queries unconverged. steps: of the slowest query. evaluations, products: of f and with its transposed
Jacobian, mean of the queries. floor: what these cost by themselves, measured in turn with the calls; overhead: time
over floor, less 1; "us a step over f": the difference, a step. relative: time over that of the default, with screening
over without, with two processes over one, in turn. worst residual: |f(z) - z| / |f(z)| of the worst query (over 1e-3
where |f(z)| is less), of the state that was returned. elsewhere: queries over 5 % from where plain iteration in float64
takes them. gradient error: relative, to that in float64 at a residual of 1e-13. peak: memory during the call above that
before it, mapped files apart.
"""


def machine() -> dict[str, object]:
    """Where and with what the table is measured."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchdeq", "numpy")},
        "threads": torch.get_num_threads(),
        "load average at start": [round(load, 2) for load in os.getloadavg()],
    }


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


TABLE: pytest.StashKey[Table] = pytest.StashKey()


class Table:
    """A plugin of pytest: keeps the rows, shows progress, and remembers what was skipped or failed."""

    def __init__(self, console: Console) -> None:
        self.records: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("collecting", total=None)

    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[TABLE] = self

    def add(self, row: Row) -> None:
        """Take a row."""
        self.records.append(row.record())

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self.task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.progress.update(self.task, description=_name(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skipped[_name(report.nodeid)] = report.longrepr[2].removeprefix("Skipped: ")  # type: ignore[index]
        elif report.failed:
            self.failed[_name(report.nodeid)] = report.longreprtext
        if report.when == "teardown":
            self.progress.advance(self.task)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext


def _name(nodeid: str) -> str:
    return nodeid.rpartition("::")[2].removeprefix("bench_")


def shown(value: object) -> str:
    """A figure with three digits; "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(told: Mapping[str, Any]) -> str:
    """The document for what bench.json holds."""
    lines = ["# The one table", "", "Written by `python -m benchmarks`.", ""]
    lines += [f"- {name}: {value}" for name, value in told["about"].items()]
    lines += ["", LEGEND, _line(HEADINGS.values()), _line(["---"] * len(HEADINGS))]
    lines += [_line(shown(row[column]) for column in HEADINGS) for row in told["rows"]]
    for title in ("skipped", "failed"):
        if told[title]:
            lines += ["", f"{title.capitalize()}:", ""]
            lines += [f"- {name}: {reason.splitlines()[-1]}" for name, reason in told[title].items()]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def write(folder: Path, told: Mapping[str, Any]) -> None:
    """bench.json and bench.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (folder / "bench.md").write_text(markdown(told), encoding="utf-8")


def show(console: Console, told: Mapping[str, Any]) -> None:
    """A table a group: what all of its rows share stands in the title, what none of them has is left out."""
    for group in dict.fromkeys(row["group"] for row in told["rows"]):
        rows = [row for row in told["rows"] if row["group"] == group]
        cells = {column: [shown(row[column]) for row in rows] for column in HEADINGS if column != "group"}
        shared = {c for c in ("what", "n", "b", "d", "dtype", "tolerance") if len(set(cells[c])) == 1}
        title = [f"{HEADINGS[c]} {cells[c][0]}" for c in cells if c in shared and cells[c][0] != "-"]
        used = [c for c in cells if c not in shared and set(cells[c]) != {"-"}]
        table = RichTable(title=", ".join([group, *title]))
        for column in used:
            table.add_column(HEADINGS[column])
        for line in zip(*(cells[column] for column in used), strict=True):
            table.add_row(*line)
        console.print(table)
    for kind in ("skipped", "failed"):
        for name, reason in told[kind].items():
            console.print(f"{kind}: {name}: {reason}", markup=False, highlight=False)
