"""`python -m benchmarks [forward] [basins] [gradients] [overhead] [theory]`: measure, print, write results/."""

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

from benchmarks import (
    basins,
    bit_patterns,
    diffusion,
    forward,
    gradients,
    ham,
    latch,
    layers,
    published,
    repertoires,
    sdm,
    separations,
    theory,
    warm,
)

PARTS: dict[str, Callable[[], list[dict[str, object]]]] = {
    "overhead": forward.overhead,
    "gradients": gradients.run,
    "precision": gradients.precision,
    "basins": basins.run,
    "forward": forward.run,
    "separations": separations.run,
    "theory": theory.run,
    "adjoints": gradients.adjoint_solvers,
}
# Studies that take minutes, run where they are named.
STUDIES: dict[str, Callable[[], list[dict[str, object]]]] = {
    "warm": warm.run,
    "bit_patterns": bit_patterns.run,
    "diffusion": diffusion.run,
    "latch": latch.run,
    "layers": layers.run,
    "repertoires": repertoires.run,
    "sdm": sdm.run,
}
# Likewise; the first needs MNIST, the second takes the digits without it.
ON_MNIST: dict[str, Callable[[Path | None], list[dict[str, object]]]] = {
    "published": published.run,
    "ham": ham.run,
}
RESULTS = Path(__file__).parent / "results"


def _show(console: Console, title: str, rows: list[dict[str, object]]) -> None:
    table = Table(title=title)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        values = [row.get(column, "") for column in columns]
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)


def main() -> None:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, *STUDIES, *ON_MNIST, []], default=[])
    parser.add_argument(
        "--mnist", type=Path, help=f"folder with the IDX files of MNIST, for {' and '.join(ON_MNIST)}"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=150)
    RESULTS.mkdir(exist_ok=True)
    for part in arguments.parts or PARTS:
        rows = ON_MNIST[part](arguments.mnist) if part in ON_MNIST else (PARTS | STUDIES)[part]()
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
