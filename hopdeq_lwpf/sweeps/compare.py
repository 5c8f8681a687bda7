"""Run a comparison: every cell, the table, the pictures and the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from hopdeq_lwpf import plots
from hopdeq_lwpf.data import replacing, staged_folder
from hopdeq_lwpf.sweeps.cells import Baselines, Cell, Outcome, call, nearest_pattern, run_cell, summarize
from hopdeq_lwpf.sweeps.engine.progress import progress
from hopdeq_lwpf.sweeps.engine.versions import versions
from hopdeq_lwpf.sweeps.reports.artefacts import draw
from hopdeq_lwpf.sweeps.reports.compare_report import write_report
from hopdeq_lwpf.sweeps.reports.statistics import Bootstrap
from hopdeq_lwpf.sweeps.reports.summary import Comparison
from hopdeq_lwpf.sweeps.reports.table import write_table
from hopdeq_lwpf.sweeps.spec import CONVERGED, CompareSpec, SpecError
from hopdeq_lwpf.sweeps.task import QuerySet, Task, build_task

Row = dict[str, Any]


def compare(spec: CompareSpec, console: Console | None = None) -> Comparison:
    """Run every cell of the spec and return what was found; progress goes to `console`.

    Raises SpecError or DataError for what cannot be run. Queries that do not converge are counted.
    """
    started = time.perf_counter()
    task = build_task(spec)
    cells = _cells(spec, task)
    outcomes = []
    with _threads(spec.threads):
        _check_names(cells, task, spec)
        with progress(len(cells), "cells", console) as advance:
            for cell in cells:
                outcomes.append(run_cell(cell, task, spec))
                advance(f"{cell.forgetting}, beta {cell.beta:g}, {cell.queries.kind}")
    rows = _rows(spec, task, cells, outcomes)
    seconds = time.perf_counter() - started
    return Comparison(spec, task, cells, tuple(outcomes), rows, _environment(spec, seconds))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cells(spec: CompareSpec, task: Task) -> tuple[Cell, ...]:
    return tuple(
        Cell(unit, steps, float(beta), queries)
        for unit in spec.forgetting
        for beta in spec.beta
        for queries in task.sets
        for steps in spec.steps
    )


def _check_names(cells: Sequence[Cell], task: Task, spec: CompareSpec) -> None:
    """One query through each unit: names are checked before the work, and first calls are not timed."""
    for unit in spec.forgetting:
        for steps in (1, CONVERGED):
            cell = Cell(unit, steps, cells[0].beta, task.sets[0])
            try:
                call(cell, task, spec, query=task.sets[0].queries[:1])
            except (ValueError, TypeError) as error:
                raise SpecError(" ".join(str(error).split())) from error


def _rows(
    spec: CompareSpec, task: Task, cells: Sequence[Cell], outcomes: Sequence[Outcome]
) -> tuple[Row, ...]:
    bootstrap = Bootstrap.draw(
        task.size, resamples=spec.resamples, confidence=spec.confidence, seed=spec.seed
    )
    found = {
        (cell.forgetting, cell.steps, cell.beta, id(cell.queries)): outcome
        for cell, outcome in zip(cells, outcomes, strict=True)
    }
    asked = {id(queries): _asked(queries, task) for queries in task.sets}
    rows = []
    for cell, outcome in zip(cells, outcomes, strict=True):
        place = (cell.beta, id(cell.queries))
        baselines = Baselines(
            no_forgetting=found.get(("none", cell.steps, *place)),
            one_step=found.get((cell.forgetting, 1, *place)),
            converged=found.get((cell.forgetting, CONVERGED, *place)),
            asked=asked[id(cell.queries)],
        )
        rows.append(summarize(cell, outcome, baselines, bootstrap))
    return tuple(rows)


def _asked(queries: QuerySet, task: Task) -> np.ndarray:
    if task.targets is None:
        return np.full(len(queries.queries), np.nan)
    found = nearest_pattern(queries.queries, task.patterns)
    return (task.patterns[found] == task.patterns[task.targets]).all(-1).double().numpy()


def _environment(spec: CompareSpec, seconds: float) -> dict[str, str]:
    return {
        **versions(),
        "threads": str(spec.threads),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "run time": f"{seconds:.1f} s",
    }


def run(spec: CompareSpec, console: Console | None = None) -> tuple[Comparison, list[Path]]:
    """`compare`, and write everything into `spec.out`; returns the paths that were written.

    The folder receives results.csv (one row a cell), queries.npz (every query of every cell), each picture
    as PNG and SVG, and report.html. Either all of them appear or none.
    """
    with _threads(spec.threads), staged_folder(spec.out) as folder:
        comparison = compare(spec, console)
        write_table(comparison.rows, folder / "results.csv")
        _write_queries(comparison, folder / "queries.npz")
        figures = draw(comparison)
        captions = {name: caption for name, (caption, _) in figures.items()}
        for name, (_, figure) in figures.items():
            plots.save_figure(figure, folder, name)
        write_report(comparison, captions, folder)
        names = sorted(path.name for path in folder.iterdir())
    return comparison, [Path(spec.out) / name for name in names]


def _write_queries(comparison: Comparison, path: Path) -> None:
    """(cells, queries) arrays, the cells in the order of results.csv."""
    names = (
        "nearest",
        "right",
        "recalled",
        "error",
        "gap",
        "basin_changed",
        "weight",
        "steps",
        "residual",
        "result",
    )
    arrays = {name: np.stack([getattr(o, name) for o in comparison.outcomes]) for name in names}
    if comparison.task.targets is not None:
        arrays["target"] = comparison.task.targets.numpy()
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
