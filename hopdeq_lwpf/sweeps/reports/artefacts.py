"""What the pictures of a comparison need beside its table: energies along trajectories, recalled pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hopdeq_lwpf import plots
from hopdeq_lwpf.sweeps.cells import Cell, call
from hopdeq_lwpf.sweeps.reports.summary import Comparison, best_beta, unit_name
from hopdeq_lwpf.sweeps.spec import CONVERGED, Steps
from hopdeq_lwpf.sweeps.task import QuerySet, Task

PICTURES = 9  # as many as fit the width of a page


@dataclass(frozen=True)
class Energies:
    """Energies along plain iteration: (T, B) by forgetting unit, and where they were taken."""

    courses: dict[str, NDArray[np.float64]]
    beta: float
    queries: QuerySet


def energies(comparison: Comparison) -> Energies | None:
    """Plain iteration where the converged runs took longest, so that there is a course to see.

    None where nothing was run to convergence, or no unit has an energy.
    """
    task, spec = comparison.task, comparison.spec
    candidates = [row for row in comparison.rows if row["steps"] == CONVERGED]
    if not candidates or not spec.trajectories:
        return None
    longest = max(candidates, key=lambda row: (row["steps_median"], row["steps_p95"]))
    chosen = _set_of(task, longest)
    some = replace(chosen, queries=chosen.queries[: spec.trajectories], raw=chosen.raw[: spec.trajectories])
    courses = {}
    for unit in spec.forgetting:
        cell = Cell(unit, CONVERGED, longest["beta"], some)
        trace = call(cell, task, spec, solver="picard", trace=True).trace
        if trace is not None and trace.energy is not None:
            courses[unit] = trace.energy.double().numpy()
    return Energies(courses, longest["beta"], some) if courses else None


@dataclass(frozen=True)
class Pictures:
    """A few queries from stored to recalled; (n, height, width) arrays by stage, in the units of the data."""

    stages: dict[str, NDArray[np.float64]]
    titles: tuple[str, ...]
    beta: float
    forgetting: str


def pictures(comparison: Comparison) -> Pictures | None:
    """The first queries of each kind, middle level, at the beta that recalls most; None without a shape."""
    task, spec = comparison.task, comparison.spec
    if task.shape is None or task.targets is None:
        return None
    kinds = list(dict.fromkeys(entry.kind for entry in task.sets))
    sets = []
    for kind in kinds:
        levels = [entry for entry in task.sets if entry.kind == kind]
        sets.append(levels[len(levels) // 2])
    each = min(max(PICTURES // len(kinds), 1), task.size)
    unit, best = spec.forgetting[0], best_beta(comparison)
    parts: dict[str, list[Any]] = {"stored": [], "corrupted": []}
    for entry in sets:
        some = replace(entry, raw=entry.raw[:each], queries=entry.queries[:each])
        parts["stored"].append(task.raw[task.targets[:each]].numpy())
        parts["corrupted"].append(some.raw.numpy())
        for steps in spec.steps:
            state = call(Cell(unit, steps, best, some), task, spec).value
            parts.setdefault(stage_name(steps), []).append(task.preprocessing.inverse(state).numpy())
    stages = {name: np.concatenate(part).reshape(-1, *task.shape) for name, part in parts.items()}
    titles = tuple(_title(entry) for entry in sets for _ in range(each))
    return Pictures(stages, titles, best, unit)


def stage_name(steps: Steps) -> str:
    """'one step', '3 steps', 'converged'."""
    return "one step" if steps == 1 else CONVERGED if steps == CONVERGED else f"{steps} steps"


def _title(entry: QuerySet) -> str:
    name = plots.KIND_NAMES[entry.kind][0]
    return name if entry.level is None else f"{name} {entry.level:g}"


def _set_of(task: Task, row: Mapping[str, Any]) -> QuerySet:
    return next(
        entry
        for entry in task.sets
        if entry.kind == row["corruption"] and (entry.level == row["level"] or entry.level is None)
    )


def draw(comparison: Comparison) -> dict[str, tuple[str, Figure]]:
    """Every picture that the comparison has the data for: (caption, figure) by name."""
    figures = _shares(comparison)
    steps: dict[tuple[str, float], list[Any]] = {}
    for cell, outcome in zip(comparison.cells, comparison.outcomes, strict=True):
        if cell.steps == CONVERGED:
            steps.setdefault((cell.forgetting, cell.beta), []).append(outcome.steps)
    if steps:
        caption = f"Steps to convergence, solver {comparison.spec.solver!r}, all query sets together."
        joined = {key: np.concatenate(parts) for key, parts in steps.items()}
        figures["steps"] = (caption, plots.steps_figure(joined, comparison.spec.max_steps))
    course = energies(comparison)
    if course is not None:
        caption = (
            f"Energy along plain iteration of {len(course.queries.queries)} queries "
            f"({_title(course.queries)}) at beta = {course.beta:g}, the slowest cell; a dot marks the end."
        )
        figures["energy"] = (caption, plots.energy_figure(course.courses))
    grid = pictures(comparison)
    if grid is not None:
        raw = comparison.task.raw
        limits = (float(raw.min()), float(raw.max()))
        caption = f"From stored to recalled: {unit_name(grid.forgetting)}, beta = {grid.beta:g}."
        figures["pictures"] = (caption, plots.picture_grid(list(grid.stages.items()), grid.titles, limits))
    return figures


def _shares(comparison: Comparison) -> dict[str, tuple[str, Figure]]:
    task, rows = comparison.task, comparison.rows
    intervals = f"with {100 * comparison.spec.confidence:g} % bootstrap intervals over queries"
    if task.sets[0].level is not None:
        caption = f"Share recalled against the strength of the corruption, {intervals}."
        return {"recall": (caption, plots.recall_figure(rows))}
    if task.targets is not None:
        return {"recall": (f"Share recalled, {intervals}.", plots.beta_figure(rows))}
    if CONVERGED in comparison.spec.steps:
        caption = f"Share of the queries whose nearest pattern is that of the converged run, {intervals}."
        return {"agreement": (caption, plots.beta_figure(rows, "agreement", "agrees with converged (%)"))}
    return {}
