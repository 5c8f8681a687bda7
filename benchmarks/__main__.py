"""`python -m benchmarks [forward] [basins] [gradients] [overhead]`: measure, print, write benchmarks/results/."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import basins, forward, gradients

PARTS: dict[str, Callable[[], list[dict[str, object]]]] = {
    "overhead": forward.overhead,
    "gradients": gradients.run,
    "precision": gradients.precision,
    "basins": basins.run,
    "forward": forward.run,
}
RESULTS = Path(__file__).parent / "results"


def _show(console: Console, title: str, rows: list[dict[str, object]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def main() -> None:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=150)
    RESULTS.mkdir(exist_ok=True)
    for part in arguments.parts or PARTS:
        rows = PARTS[part]()
        _show(console, part, rows)
        record = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "threads": arguments.threads,
            "processor": platform.processor() or platform.machine(),
            "rows": rows,
        }
        (RESULTS / f"{part}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
