"""One cell of a comparison: retrieve, judge every query, and sum up in one row of the table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import vector_norm

from hopdeq_lwpf import Result, Termination, retrieve
from hopdeq_lwpf.diagnostics import (
    FixedPoint,
    basin_changed,
    classify,
    picard_limit,
    spectral_radius,
    storage_condition,
)
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.sweeps.reports.statistics import Bootstrap
from hopdeq_lwpf.sweeps.spec import CONVERGED, CompareSpec, Steps
from hopdeq_lwpf.sweeps.task import QuerySet, Task

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
    points: Points | None  # of a converged run
    stored: float  # patterns that the storage condition grants; NaN where no theorem applies


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


def _function(cell: Cell, spec: CompareSpec) -> Retrieval:
    """The fixed-point function that `call` solves."""
    unit = None if cell.forgetting == "none" else cell.forgetting
    return Retrieval(cell.beta, forgetting=unit, separation=spec.separation)


def _basin_changes(state: Tensor, cell: Cell, task: Task, spec: CompareSpec) -> Tensor:
    """(B,) float64: 1 where plain iteration in float64 ends elsewhere, NaN where it does not converge."""
    f = _function(cell, spec)
    with torch.no_grad():
        # From float64 input, so that the forgetting threshold is drawn in float64 too.
        x = f.prepare(cell.queries.queries.double(), task.patterns.double())
    stop = Termination(
        rtol=spec.reference_rtol, atol=spec.atol, max_steps=spec.reference_max_steps, check_every=1
    )
    return basin_changed(state, picard_limit(f, x, f.init(x), stop=stop))


@dataclass(frozen=True)
class Points:
    """What kind of fixed points a converged run ended in; (B,) arrays, NaN for queries that were not asked."""

    kind: NDArray[np.int64]  # `FixedPoint` codes
    size: NDArray[np.int64]  # number of patterns that hold 90 % of the weight
    radius: NDArray[np.float64]  # spectral radius of the Jacobian, of a sample of the queries
    used: NDArray[np.bool_]  # (N,): some query gives the pattern a weight


def _points(state: Tensor, cell: Cell, task: Task, spec: CompareSpec) -> Points:
    f = _function(cell, spec)
    queries = cell.queries.queries
    with torch.no_grad():
        x = f.prepare(queries, task.patterns)
        weights = f.weights(state, x)
        kinds = classify(weights)
        radius = torch.full(state.shape[:1], torch.nan, dtype=torch.float64)
        # The same queries in every cell, so that cells are compared in pairs.
        order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(spec.seed))
        rows = order[: spec.spectrum].sort().values
        some = f.prepare(queries[rows], task.patterns)
    if len(rows):
        radius[rows] = spectral_radius(f, state[rows], some).radius.double()
    return Points(kinds.kind.numpy(), kinds.size.numpy(), radius.numpy(), (weights > 0).any(0).numpy())


@lru_cache(maxsize=16)
def stored_patterns(patterns: Tensor, beta: float) -> int:
    """How many patterns the storage condition of softmax retrieval grants; the same for every cell of a beta."""
    return int(storage_condition(patterns.double(), beta).stored.sum())


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
    changed, points = none, None
    if cell.steps == CONVERGED:
        points = _points(recall.state, cell, task, spec)
        changed = _basin_changes(recall.state, cell, task, spec) if spec.reference else none
    covered = spec.separation == "softmax" and cell.forgetting == "none"
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
        points=points,
        stored=stored_patterns(task.patterns, cell.beta) if covered else np.nan,
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
    return row | _plain_columns(outcome, baselines) | _point_columns(outcome)


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


def _point_columns(outcome: Outcome) -> dict[str, Any]:
    """Types and contraction of the fixed points; NaN where the run was not to convergence."""
    points, unknown = outcome.points, np.nan
    if points is None:
        names = ("single", "metastable", "metastable_size", "global", "radius_median", "radius_p95", "dead")
        return dict.fromkeys(names, unknown) | {"stored": outcome.stored}
    middle = points.kind == FixedPoint.METASTABLE
    known = points.radius[~np.isnan(points.radius)]
    return {
        "single": float((points.kind == FixedPoint.SINGLE).mean()),
        "metastable": float(middle.mean()),
        "metastable_size": float(np.median(points.size[middle])) if middle.any() else unknown,
        "global": float((points.kind == FixedPoint.GLOBAL).mean()),
        "radius_median": float(np.median(known)) if known.size else unknown,
        "radius_p95": float(np.quantile(known, 0.95)) if known.size else unknown,
        "dead": float((~points.used).sum()),
        "stored": outcome.stored,
    }
