"""`python -m benchmarks`: the suite, whose rows make one table. `python -m benchmarks STUDY ...`: studies by name."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Study: module and function. Those of the first line take seconds, those of the second minutes.
STUDIES = {
    "adjoints": "gradients.adjoint_solvers", "basins": "basins.run", "precision": "gradients.precision",
    "separations": "separations.run", "theory": "theory.run",
    "bit_patterns": "bit_patterns.run", "diffusion": "diffusion.run", "latch": "latch.run", "layers": "layers.run",
    "repertoires": "repertoires.run", "sdm": "sdm.run", "warm": "warm.run",
}  # fmt: skip
# Likewise; the first needs MNIST, the second takes the digits without it.
ON_MNIST = {"published": "published.run", "ham": "ham.run"}
RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, object]]


def _function(name: str) -> Callable[..., Rows]:
    module, _, function = name.partition(".")
    found: Callable[..., Rows] = getattr(import_module(f"benchmarks.{module}"), function)
    return found


def _show(console: Console, title: str, rows: Rows) -> None:
    table = Table(title=title)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        values = [row.get(column, "") for column in columns]
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)


def _study(name: str, mnist: Path | None, threads: int, out: Path) -> None:
    import torch

    torch.set_num_threads(threads)
    rows = _function(ON_MNIST[name])(mnist) if name in ON_MNIST else _function(STUDIES[name])()
    _show(Console(width=150), name, rows)
    record = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": threads,
        "processor": platform.processor() or platform.machine(),
        "rows": rows,
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join([*STUDIES, *ON_MNIST]))
    parser.add_argument(
        "--mnist", type=Path, help=f"folder with the IDX files of MNIST, for {' and '.join(ON_MNIST)}"
    )
    parser.add_argument("--threads", type=int, default=2)
    default = f"benchmarks/{RESULTS.name}; with --quick or --rows nothing is written"
    parser.add_argument("--out", type=Path, help=f"folder of the tables (default: {default})")
    parser.add_argument("--quick", action="store_true", help="the suite with tiny problems: does it run?")
    parser.add_argument(
        "--rows", default="", metavar="WORD", help="rows of the suite by name, as pytest's -k"
    )
    given = parser.parse_args()
    unknown = [name for name in given.studies if name not in STUDIES | ON_MNIST]
    if unknown:
        parser.error(f"no study {unknown[0]!r}; there are {', '.join([*STUDIES, *ON_MNIST])}")
    return given


def main() -> int:
    """The suite, or the studies that are named."""
    given = _arguments()
    # Part of the table must not stand in the place of the whole.
    out = given.out or (None if given.quick or given.rows else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for name in given.studies:
        _study(name, given.mnist, given.threads, out or RESULTS)
    if given.studies:
        return 0
    if find_spec("pytest_benchmark") is None:
        sys.stderr.write("the suite needs pytest-benchmark: pip install 'hopdeq_lwpf[test]'\n")
        return 1
    # Before the suite is imported, which reads it.
    os.environ["HOPDEQ_LWPF_QUICK"] = str(int(given.quick))
    from benchmarks.suite.run import run_suite

    return run_suite(out, given.threads, given.rows)


if __name__ == "__main__":
    sys.exit(main())
