"""What a comparison comes to: small tables for the terminal and the report, and findings in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hopdeq_lwpf import plots
from hopdeq_lwpf.diagnostics import FixedPoint, steps_per_digit
from hopdeq_lwpf.sweeps.cells import Cell, Outcome, Points
from hopdeq_lwpf.sweeps.reports.statistics import Bootstrap, Interval
from hopdeq_lwpf.sweeps.reports.table import Row
from hopdeq_lwpf.sweeps.spec import CONVERGED, CompareSpec
from hopdeq_lwpf.sweeps.task import Task


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; outcomes and rows are in the order of the cells."""

    spec: CompareSpec
    task: Task
    cells: tuple[Cell, ...]
    outcomes: tuple[Outcome, ...]  # of each query
    rows: tuple[dict[str, Any], ...]  # of the results table
    environment: dict[str, str]


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def unit_name(unit: str) -> str:
    """The name of a forgetting unit as the tables write it."""
    return plots.UNIT_NAMES.get(unit, unit)


def percent(share: Interval) -> str:
    """'59.4 [54.1, 64.2]', in per cent; '-' where there was nothing to average."""
    if np.isnan(share.mean):
        return "-"
    return f"{100 * share.mean:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def measure(comparison: Comparison) -> tuple[str, str]:
    """Column and name of what the tables compare: recall, or agreement where no right answer is known."""
    if comparison.task.targets is not None:
        return "recall", "recalled"
    return "agreement", "same nearest pattern as converged"


def best_beta(comparison: Comparison) -> float:
    """The beta with the highest mean recall over all cells; the lowest of several, and without recall."""
    shares = {
        beta: float(np.mean([row["recall"] for row in comparison.rows if row["beta"] == beta]))
        for beta in sorted(comparison.spec.beta)
    }
    return max(shares, key=lambda beta: shares[beta])


def summaries(comparison: Comparison) -> list[Grid]:
    """The tables: by beta over all query sets, by level at the best beta, and how the converged runs went."""
    grids = [_by_beta(comparison)]
    if comparison.task.sets[0].level is not None:
        kinds = dict.fromkeys(entry.kind for entry in comparison.task.sets)
        grids += [_by_level(comparison, kind) for kind in kinds]
    if CONVERGED in comparison.spec.steps:
        grids += [_solves(comparison), _fixed_points(comparison)]
    return grids


def _bootstrap(comparison: Comparison) -> Bootstrap:
    spec = comparison.spec
    return Bootstrap.draw(
        comparison.task.size, resamples=spec.resamples, confidence=spec.confidence, seed=spec.seed
    )


def _by_beta(comparison: Comparison) -> Grid:
    spec, bootstrap = comparison.spec, _bootstrap(comparison)
    column, name = measure(comparison)
    compared = dict(zip(comparison.cells, _values(comparison, column), strict=True))
    lines = []
    for unit in spec.forgetting:
        for steps in spec.steps:
            line = [unit_name(unit), str(steps)]
            for beta in spec.beta:
                # The mean over the sets first: the same queries are in each, so that they are drawn together.
                together = [
                    v for c, v in compared.items() if (c.forgetting, c.steps, c.beta) == (unit, steps, beta)
                ]
                line.append(percent(bootstrap.mean(np.mean(together, axis=0))))
            lines.append(tuple(line))
    sets = len(comparison.task.sets)
    over = f", mean over {sets} query sets" if sets > 1 else ""
    title = f"Share {name} in % [{100 * spec.confidence:g} % interval] by beta{over}"
    return Grid(title, ("forgetting", "steps", *(f"beta {beta:g}" for beta in spec.beta)), tuple(lines))


def _values(comparison: Comparison, column: str) -> list[np.ndarray]:
    if column == "recall":
        return [outcome.recalled for outcome in comparison.outcomes]
    ends = {
        (cell.forgetting, cell.beta, cell.queries.kind, cell.queries.level): outcome.nearest
        for cell, outcome in zip(comparison.cells, comparison.outcomes, strict=True)
        if cell.steps == CONVERGED
    }
    values = []
    for cell, outcome in zip(comparison.cells, comparison.outcomes, strict=True):
        end = ends.get((cell.forgetting, cell.beta, cell.queries.kind, cell.queries.level))
        same = (
            np.full(len(outcome.nearest), np.nan) if end is None else (outcome.nearest == end).astype(float)
        )
        values.append(same)
    return values


def _by_level(comparison: Comparison, kind: str) -> Grid:
    spec, beta = comparison.spec, best_beta(comparison)
    levels = [entry.level for entry in comparison.task.sets if entry.kind == kind]
    rows = [row for row in comparison.rows if row["beta"] == beta and row["corruption"] == kind]
    asked = {row["level"]: row["nearest_query"] for row in rows}
    lines = [("nearest neighbour", "0", *(f"{100 * asked[level]:.1f}" for level in levels))]
    for unit in spec.forgetting:
        for steps in spec.steps:
            found = {r["level"]: r for r in rows if r["forgetting"] == unit and r["steps"] == steps}
            lines.append(
                (
                    unit_name(unit),
                    str(steps),
                    *(percent(interval(found[level], "recall")) for level in levels),
                )
            )
    name = plots.KIND_NAMES[kind][0]
    title = f"Share recalled in % at beta {beta:g}, {name}, by {plots.KIND_NAMES[kind][1]}"
    return Grid(title, ("forgetting", "steps", *(f"{level:g}" for level in levels)), tuple(lines))


def interval(row: Row, column: str) -> Interval:
    """A column of the table with its limits."""
    return Interval(row[column], row[f"{column}_low"], row[f"{column}_high"])


def _solves(comparison: Comparison) -> Grid:
    """How the converged runs went: by unit and beta, all query sets together."""
    lines = []
    for unit in comparison.spec.forgetting:
        for beta in comparison.spec.beta:
            which = [
                i
                for i, cell in enumerate(comparison.cells)
                if (cell.forgetting, cell.steps, cell.beta) == (unit, CONVERGED, beta)
            ]
            outcomes, rows = [comparison.outcomes[i] for i in which], [comparison.rows[i] for i in which]
            lines.append((unit_name(unit), f"{beta:g}", *_solve_line(outcomes, rows)))
    header = (
        "forgetting",
        "beta",
        "steps median",
        "95 %",
        "converged %",
        "not",
        "basin changes",
        "forgot all %",
    )
    return Grid(
        "Converged runs, all query sets together", (*header, "top weight", "ms per query"), tuple(lines)
    )


def _solve_line(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> tuple[str, ...]:
    steps = np.concatenate([outcome.steps for outcome in outcomes])
    missed = sum(row["max_steps"] + row["diverged"] + row["nonfinite"] for row in rows)
    changed = np.concatenate([outcome.basin_changed for outcome in outcomes])
    compared = int((~np.isnan(changed)).sum())
    mean: Callable[[str], float] = lambda name: float(np.mean([row[name] for row in rows]))  # noqa: E731
    return (
        f"{np.median(steps):g}",
        f"{np.quantile(steps, 0.95):.0f}",
        f"{100 * mean('converged'):.1f}",
        str(missed),
        f"{int(np.nansum(changed))} of {compared}" if compared else "-",
        f"{100 * mean('forgotten'):.1f}",
        f"{mean('weight'):.3f}",
        f"{mean('ms_per_query'):.3f}",
    )


def _fixed_points(comparison: Comparison) -> Grid:
    """What kind of fixed points the converged runs ended in: by unit and beta, all query sets together."""
    lines = []
    for unit in comparison.spec.forgetting:
        for beta in comparison.spec.beta:
            points = [
                outcome.points
                for cell, outcome in zip(comparison.cells, comparison.outcomes, strict=True)
                if (cell.forgetting, cell.beta) == (unit, beta) and outcome.points is not None
            ]
            stored = _stored(comparison, beta) if unit == "none" else np.nan
            lines.append((unit_name(unit), f"{beta:g}", *_point_line(points, stored)))
    header = ("forgetting", "beta", "single %", "metastable %", "size", "global %", "forgot all %")
    more = ("radius median", "95 %", "steps a digit", "dead patterns", "stored by condition")
    title = "Fixed points of the converged runs, their contraction, and the patterns, all query sets together"
    return Grid(title, (*header, *more), tuple(lines))


def _point_line(points: Sequence[Points], stored: float) -> tuple[str, ...]:
    kind = np.concatenate([each.kind for each in points])
    size = np.concatenate([each.size for each in points])[kind == FixedPoint.METASTABLE]
    radius = np.concatenate([each.radius for each in points])
    radius = radius[~np.isnan(radius)]
    share = {code: f"{100 * float((kind == code).mean()):.1f}" for code in FixedPoint}
    unused = ~np.any([each.used for each in points], axis=0)
    slow = np.quantile(radius, 0.95) if radius.size else np.nan
    return (
        share[FixedPoint.SINGLE],
        share[FixedPoint.METASTABLE],
        f"{np.median(size):g}" if size.size else "-",
        share[FixedPoint.GLOBAL],
        share[FixedPoint.FORGOTTEN],
        f"{np.median(radius):.3f}" if radius.size else "-",
        f"{slow:.3f}" if radius.size else "-",
        f"{float(steps_per_digit(torch.tensor(slow))):.1f}" if radius.size else "-",
        str(int(unused.sum())),
        "-" if np.isnan(stored) else f"{int(stored)} of {unused.size}",
    )


def _stored(comparison: Comparison, beta: float) -> float:
    """Patterns that the storage condition grants at this beta; NaN where no cell asked."""
    found = [row["stored"] for row in comparison.rows if row["beta"] == beta and not np.isnan(row["stored"])]
    return found[0] if found else float("nan")


def findings(comparison: Comparison) -> list[str]:
    """What the table says, in sentences made from its numbers."""
    rows, spec = comparison.rows, comparison.spec
    said = []
    if CONVERGED in spec.steps:
        solved = [row for row in rows if row["steps"] == CONVERGED]
        asked = sum(row["queries"] for row in solved)
        missed = sum(row["max_steps"] + row["diverged"] + row["nonfinite"] for row in solved)
        said.append(f"Converged runs: {missed} of {asked} queries did not reach the tolerance.")
        compared = sum(row["basin_compared"] for row in solved)
        if spec.reference:
            changed = sum(
                round(row["basin_changes"] * row["basin_compared"]) for row in solved if row["basin_compared"]
            )
            said.append(
                f"Basins: {changed} of {compared} queries ended elsewhere than plain float64 iteration; for "
                f"{asked - compared} that iteration did not converge itself."
            )
        said += _point_findings(comparison)
    said += _gain(rows, "gain_steps", "one step", lambda row: row["steps"] != 1)
    said += _gain(rows, "gain_forgetting", "no forgetting", lambda row: row["forgetting"] != "none")
    lost = sum(round(row["forgotten"] * row["queries"]) for row in rows)
    said.append(
        f"Total forgetting (no pattern kept, nothing recalled): {lost} of {sum(r['queries'] for r in rows)}."
    )
    return said


def _point_findings(comparison: Comparison) -> list[str]:
    points = [outcome.points for outcome in comparison.outcomes if outcome.points is not None]
    radius = np.concatenate([each.radius for each in points])
    radius = radius[~np.isnan(radius)]
    said = []
    if radius.size:
        slow = float(np.quantile(radius, 0.95))
        steps = float(steps_per_digit(torch.tensor(slow)))
        said.append(
            f"Contraction: spectral radius at the equilibrium median {np.median(radius):.3f}, 95 % {slow:.3f} (there "
            f"plain iteration needs {steps:.1f} steps a digit); {int((radius >= 1).sum())} of "
            f"{radius.size} sampled equilibria are unstable."
        )
    stored = {beta: _stored(comparison, beta) for beta in comparison.spec.beta}
    known = [f"{int(count)} at beta {beta:g}" for beta, count in stored.items() if not np.isnan(count)]
    if known:
        said.append(
            f"Stored by the sufficient condition of theory, without forgetting: {', '.join(known)}, of "
            f"{len(comparison.task.patterns)} patterns."
        )
    return said


def _gain(rows: Sequence[Row], column: str, other: str, applies: Callable[[Row], bool]) -> list[str]:
    said = []
    by = "steps" if column == "gain_steps" else "forgetting"
    for name in dict.fromkeys(row[by] for row in rows if applies(row)):
        cells = [row for row in rows if row[by] == name and not np.isnan(row[column])]
        if not cells:
            continue
        better = sum(row[f"{column}_low"] > 0 for row in cells)
        worse = sum(row[f"{column}_high"] < 0 for row in cells)
        ends = max((row[column] for row in cells), key=abs)
        label = plots.steps_name(name) if by == "steps" else unit_name(name)
        said.append(
            f"{label} against {other}: recalls more in {better} and less in {worse} of {len(cells)} cells "
            f"(interval of the paired difference without 0); largest difference {100 * ends:+.1f} points."
        )
    return said
