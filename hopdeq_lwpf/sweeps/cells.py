"""One cell of a comparison: retrieve, judge every query, and sum up in one row of the table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import vector_norm

from hopdeq_lwpf import Result, Termination, retrieve
from hopdeq_lwpf.sweeps.spec import CONVERGED, CompareSpec, Steps
from hopdeq_lwpf.sweeps.statistics import Bootstrap
from hopdeq_lwpf.sweeps.task import QuerySet, Task

BASIN_DISTANCE = 0.05  # another attractor, not the same one at another tolerance: relative, as in the promise

# Calls shorter than this are repeated, since a scheduler's hiccup would be most of what is timed.
SHORT_CALL = 0.02  # seconds
REPEATS = 3


@dataclass(frozen=True)
class Cell:
    """One combination of settings."""

    forgetting: str
    steps: Steps
    beta: float
    queries: QuerySet


@dataclass(frozen=True)
class Outcome:
    """What became of each query, (B,) arrays; NaN where a question has no answer."""

    nearest: NDArray[np.int64]  # row of the pattern nearest to what was recalled; -1 if nothing was
    right: NDArray[np.float64]  # 1 where that is the right pattern
    recalled: NDArray[np.float64]  # 1 where it is right and within max_error
    error: NDArray[np.float64]  # distance to the right pattern, over its length
    gap: NDArray[np.float64]  # distance to the nearest pattern, over its length
    basin_changed: NDArray[np.float64]  # 1 where plain Picard iteration ends elsewhere
    forgotten: NDArray[np.float64]  # 1 where no pattern was kept
    weight: NDArray[np.float64]  # of the strongest pattern
    steps: NDArray[np.int64]
    evaluations: NDArray[np.int64]
    residual: NDArray[np.float64]
    result: NDArray[np.int64]
    seconds: float  # for all queries together


def call(cell: Cell, task: Task, spec: CompareSpec, **more: Any) -> Any:
    """`retrieve` with the settings of a cell; `more` replaces or adds arguments of `retrieve`."""
    arguments: dict[str, Any] = {
        "beta": cell.beta,
        "forgetting": None if cell.forgetting == "none" else cell.forgetting,
        "separation": spec.separation,
        "steps": None if cell.steps == CONVERGED else cell.steps,
        "solver": spec.solver,
        # Tested at every step, so that the steps reported are the steps needed.
        "stop": Termination(rtol=spec.rtol, atol=spec.atol, max_steps=spec.max_steps, check_every=1),
    }
    arguments.update(more)
    query = arguments.pop("query", cell.queries.queries)
    patterns = arguments.pop("patterns", task.patterns)
    with torch.no_grad():
        return retrieve(query, patterns, **arguments)


def _timed(cell: Cell, task: Task, spec: CompareSpec) -> tuple[Any, float]:
    seconds: list[float] = []
    while len(seconds) < REPEATS and (not seconds or max(seconds) < SHORT_CALL):
        start = time.perf_counter()
        recall = call(cell, task, spec)
        seconds.append(time.perf_counter() - start)
    return recall, float(np.median(seconds))


def picard_limit(cell: Cell, task: Task, spec: CompareSpec) -> Any:
    """Where plain Picard iteration in float64 takes the same queries."""
    return call(
        cell,
        task,
        spec,
        query=cell.queries.queries.double(),
        patterns=task.patterns.double(),
        solver="picard",
        stop=Termination(rtol=spec.reference_rtol, atol=spec.atol, max_steps=spec.reference_max_steps),
    )


def basin_changes(state: Tensor, limit: Any) -> Tensor:
    """(B,) float64: 1 where `state` is not the limit, NaN where plain iteration did not converge either."""
    distance = vector_norm(state.double() - limit.state, dim=-1)
    changed = (distance > BASIN_DISTANCE * vector_norm(limit.state, dim=-1)).double()
    return changed.masked_fill(~limit.converged, torch.nan)


def nearest_pattern(states: Tensor, patterns: Tensor) -> Tensor:
    """(B,) row of the nearest pattern; -1 where a state is not finite."""
    closeness = states @ patterns.mT - patterns.square().sum(-1) / 2
    return closeness.argmax(-1).masked_fill(~states.isfinite().all(-1), -1)


def _same_pattern(found: Tensor, targets: Tensor, patterns: Tensor) -> Tensor:
    # A pattern that is stored twice is right under both numbers.
    return (found >= 0) & ((found == targets) | (patterns[found] == patterns[targets]).all(-1))


def _relative_distance(states: Tensor, wanted: Tensor) -> Tensor:
    length = vector_norm(wanted, dim=-1)
    return vector_norm(states - wanted, dim=-1) / length.masked_fill(length == 0, 1)


def run_cell(cell: Cell, task: Task, spec: CompareSpec) -> Outcome:
    """Retrieve the queries of one cell and judge each."""
    recall, seconds = _timed(cell, task, spec)
    states, patterns = recall.value, task.patterns
    forgotten = recall.index < 0
    found = nearest_pattern(states, patterns).masked_fill(forgotten, -1)
    none = torch.full(found.shape, torch.nan, dtype=torch.float64)
    gap = _relative_distance(states, patterns[found.clamp(min=0)]).double().masked_fill(found < 0, torch.nan)
    right, error, good = none, none, none
    if task.targets is not None:
        is_right = _same_pattern(found, task.targets, patterns)
        error = _relative_distance(states, patterns[task.targets]).double()
        right, good = is_right.double(), (is_right & (error <= spec.max_error)).double()
    changed = none
    if spec.reference and cell.steps == CONVERGED:
        changed = basin_changes(recall.state, picard_limit(cell, task, spec))
    return Outcome(
        nearest=found.numpy(),
        right=right.numpy(),
        recalled=good.numpy(),
        error=error.numpy(),
        gap=gap.numpy(),
        basin_changed=changed.numpy(),
        forgotten=forgotten.double().numpy(),
        weight=recall.weight.double().numpy(),
        steps=recall.steps.numpy(),
        evaluations=recall.evaluations.numpy(),
        residual=recall.residual.double().numpy(),
        result=recall.result.numpy(),
        seconds=seconds,
    )


@dataclass(frozen=True)
class Baselines:
    """The outcomes that a cell is compared with, query by query; None where they were not asked for."""

    no_forgetting: Outcome | None
    one_step: Outcome | None
    converged: Outcome | None
    asked: NDArray[np.float64]  # 1 where the query itself is nearest to the right pattern; NaN: not known


def summarize(cell: Cell, outcome: Outcome, baselines: Baselines, bootstrap: Bootstrap) -> dict[str, Any]:
    """One row of the table; its columns are explained in `table.COLUMNS`."""
    row: dict[str, Any] = {
        "forgetting": cell.forgetting,
        "steps": cell.steps,
        "beta": cell.beta,
        "corruption": cell.queries.kind,
        "level": np.nan if cell.queries.level is None else cell.queries.level,
        "queries": len(outcome.nearest),
    }
    unknown = np.full(len(outcome.nearest), np.nan)
    same = unknown
    if baselines.converged is not None:
        same = (outcome.nearest == baselines.converged.nearest).astype(np.float64)
    gains = [
        unknown if other is None else outcome.recalled - other.recalled
        for other in (baselines.no_forgetting, baselines.one_step)
    ]
    for name, values in (
        ("recall", outcome.recalled),
        ("error", outcome.error),
        ("gain_forgetting", gains[0]),
        ("gain_steps", gains[1]),
        ("agreement", same),
        ("basin_changes", outcome.basin_changed),
    ):
        interval = bootstrap.mean(values)
        row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row | _plain_columns(outcome, baselines)


def _plain_columns(outcome: Outcome, baselines: Baselines) -> dict[str, Any]:
    size, codes = len(outcome.nearest), outcome.result
    finite = outcome.residual[np.isfinite(outcome.residual)]
    return {
        "nearest": float(outcome.right.mean()),
        "nearest_query": float(baselines.asked.mean()),
        "gap": float(np.nanmean(outcome.gap)) if np.isfinite(outcome.gap).any() else np.nan,
        "steps_median": float(np.median(outcome.steps)),
        "steps_p95": float(np.quantile(outcome.steps, 0.95)),
        "steps_max": int(outcome.steps.max()),
        "evaluations_mean": float(outcome.evaluations.mean()),
        "converged": float((codes == Result.CONVERGED).mean()),
        "max_steps": int((codes == Result.MAX_STEPS).sum()),
        "diverged": int((codes == Result.DIVERGED).sum()),
        "nonfinite": int((codes == Result.NONFINITE).sum()),
        "residual_median": float(np.median(finite)) if finite.size else np.nan,
        "residual_max": float(finite.max()) if finite.size else np.nan,
        "basin_compared": int((~np.isnan(outcome.basin_changed)).sum()),
        "forgotten": float(outcome.forgotten.mean()),
        "weight": float(np.nanmean(outcome.weight)) if np.isfinite(outcome.weight).any() else np.nan,
        "ms_per_query": 1e3 * outcome.seconds / size,
    }
