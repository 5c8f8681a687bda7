"""Run the suite and write its table."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.suite.report import Table, machine, show, write

FOLDER = Path(__file__).parent
# The settings of the tests (warnings as errors, their markers) are not those of the suite.
SETTINGS = {"addopts": "", "filterwarnings": "", "python_files": "bench_*.py", "python_functions": "bench_*"}
OPTIONS = [part for name, value in SETTINGS.items() for part in ("-o", f"{name}={value}")]
OPTIONS += ["-s", "--continue-on-collection-errors"]
OPTIONS += [part for plugin in ("terminal", "cacheprovider", "xdist") for part in ("-p", f"no:{plugin}")]
# Of the table where it is printed into a file or a pipe.
WIDTH = 200
# In the order of the table.
MODULES = ("forward", "gradients", "step", "overhead", "streaming", "screening", "scaling", "gpu")


def _cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def run_suite(out: Path | None, threads: int, keyword: str) -> int:
    """Measure, show and, if `out` is a folder, write to it; the exit status: 0 if no row failed.

    keyword: pytest's -k, which chooses rows by name.
    """
    torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    about = machine()
    table = Table(console)
    start = time.perf_counter()
    with table.progress:
        modules = [str(FOLDER / f"bench_{name}.py") for name in MODULES]
        status = pytest.main([*OPTIONS, "-k", keyword, *modules], plugins=[table])
    about |= {"seconds": round(time.perf_counter() - start), "CPU seconds": round(_cpu_seconds())}
    told = {"about": about, "rows": table.records, "skipped": table.skipped, "failed": table.failed}
    if out is not None:
        write(out, told)
    show(console, told)
    return int(status)
