"""Pictures of a sweep, from its numbers and the residuals that its trials left; each returns a Figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hopdeq_lwpf import plots
from hopdeq_lwpf.diagnostics.iterations import iterations_to
from hopdeq_lwpf.plots import REFERENCE_GREY, WIDTH, style
from hopdeq_lwpf.sweeps.reports.sweep_results import Sweep, measure_name
from hopdeq_lwpf.sweeps.sweep_spec import Cell, SweepTrial

RESIDUALS = "residuals.npz"  # of training.run, whose import takes seconds
# Okabe and Ito's palette, by the last factor that has several levels.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v")
LINES = 60  # cells below each other that are still readable
# Costs, the one first that other work on the machine changes least.
COST = (
    "epoch_cpu_seconds", "epoch_seconds", "seconds", "iterations", "iterations_published", "evaluations", "steps",
)  # fmt: skip
DISTRIBUTIONS = {
    "iterations": "iterations to the tolerance, of each validation problem",
    "steps": "mean steps of an epoch",
    "residual": "last residual, of each validation problem",
    "residual_max": "largest residual of an epoch",
}
ENDS = 30  # of them where there are more
CUT = 100.0  # relative residuals of states near 0 are of any size, and would make all others a dot
PANELS = 8  # heat maps in one picture that are still readable


def draw(sweep: Sweep) -> dict[str, tuple[str, Figure]]:
    """Every picture that there are numbers for: (caption, figure) by name."""
    spec, figures = sweep.spec, {}
    known = [m for m in spec.measures if any(not np.isnan(sweep.values(c, m)).all() for c in sweep.cells())]
    interval = f"{100 * spec.confidence:g} % interval"
    if len(spec.seeds) == 1:
        interval = "interval left out, since there is one seed"
    if known:
        cells, some = shown(sweep, known[0])
        figures["measures"] = (
            f"Small dots: seeds; large ones: their mean, with its {interval}. Colour: {_coloured(cells)[0]}.{some}",
            measures_figure(sweep, known, cells),
        )
    if spec.x is not None and known:
        figures["course"] = (
            f"Mean {measure_name(known[0])} against {spec.x}, with its {interval}.",
            course_figure(sweep, known[0], spec.x),
        )
    cost = cost_measure(sweep)
    if known and cost is not None and known[0] != cost:
        figures["cost"] = (
            f"Mean {measure_name(known[0])} against mean {measure_name(cost)}, a dot a cell; line: {interval} of the "
            "former.",
            cost_figure(sweep, known[0], cost),
        )
    spread = distributions(sweep)
    if spread:
        some = f" of the first {ENDS} cells" if len(sweep.cells()) > LINES else ""
        words = " and ".join(DISTRIBUTIONS[name] for name in spread)
        figures["distributions"] = (
            f"{words[0].upper()}{words[1:]}{some}. Dot: median; thick line: half of the "
            f"values, thin line: 95 %.{' Residuals above 100 are drawn there.' * _cut(spread)}",
            distributions_figure(spread),
        )
    return {**figures, **_convergence(sweep)}


def _convergence(sweep: Sweep) -> dict[str, tuple[str, Figure]]:
    spec = sweep.spec
    residuals = _residuals(sweep)
    if not residuals:
        return {}
    some = f" of the first {len(residuals)} cells" if len(residuals) < len(sweep.cells()) else ""
    tolerance = next(t.given.iterations["tolerance"] for t in sweep.trials if t.given.iterations)
    return {
        "residuals": (
            f"Relative residuals{some} over the iterations after training, validation problems, seed {spec.seeds[0]}: "
            "the colour is the share of problems, the marker the mean number of iterations to the tolerance.",
            plots.residual_heatmap(residuals, tolerance=tolerance),
        ),
        "not_converged": (
            f"Share of validation problems{some} that have not met the tolerance yet, seed {spec.seeds[0]}.",
            plots.not_converged_figure(residuals, tolerance=tolerance),
        ),
    }


def shown(sweep: Sweep, measure: str) -> tuple[Sequence[Cell], str]:
    """The cells that fit below each other, and a sentence where those are not all."""
    cells = sweep.cells()
    if len(cells) <= LINES:
        return cells, ""
    means = {cell: sweep.interval(cell, measure).mean for cell in cells}
    order = sorted(
        (cell for cell in cells if not math.isnan(means[cell])), key=means.__getitem__, reverse=True
    )
    half = ENDS // 2
    ends = order if len(order) <= ENDS else [*order[:half], *order[-half:]]
    return ends, f" Of {len(cells)} cells the {half} with the highest and the {half} with the lowest mean."


def _coloured(cells: Sequence[Cell]) -> tuple[str, list[str]]:
    """The last factor that has a few levels, else the last one; its name and levels."""
    levels = _levels(cells)
    few = [factor for factor in levels if 1 < len(levels[factor]) <= len(COLOURS)]
    name = (few or list(levels) or [""])[-1]
    return (name, levels[name]) if name else ("none", [""])


def measures_figure(sweep: Sweep, measures: Sequence[str], cells: Sequence[Cell]) -> Figure:
    """One panel a measure, one line a cell."""
    factor, levels = _coloured(cells)
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(cells)), layout="constrained")
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            for place, cell in enumerate(cells):
                level = dict(cell.levels).get(factor, "")
                colour = COLOURS[levels.index(level) % len(COLOURS)]
                values = sweep.values(cell, measure)
                values = values[~np.isnan(values)]
                axes.plot(
                    values, np.full(len(values), place + 0.22), "o", color=colour, alpha=0.5, ms=2.6, mew=0
                )
                found = sweep.interval(cell, measure)
                if not math.isnan(found.low):
                    axes.plot([found.low, found.high], [place] * 2, color=colour, lw=1.4)
                axes.plot(found.mean, place, "o", color=colour, ms=4.5, mec="white", mew=0.6)
            axes.set_xlabel(textwrap.fill(measure_name(measure), 13))  # panels are narrow
            axes.margins(x=0.08)
            axes.locator_params(axis="x", nbins=4)
        panels[0].set_yticks(range(len(cells)), [plain(cell.name) for cell in cells])
        panels[0].set_ylim(len(cells) - 0.5, -0.5)
        for axes in panels:
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False, axis="y")
        return figure


def course_figure(sweep: Sweep, measure: str, x: str) -> Figure:
    """A measure against a factor of numbers: a line a level of the last other factor, a panel for all else."""
    others = [factor for factor in sweep.spec.factors() if factor != x]
    lines: dict[str, dict[str, list[Cell]]] = {}  # by panel and line
    for cell in sweep.cells():
        panel = ", ".join(f"{factor} {cell.level(factor)}" for factor in others[:-1])
        line = cell.level(others[-1]) if others else ""
        lines.setdefault(panel, {}).setdefault(line, []).append(cell)
    names = list(dict.fromkeys(name for panel in lines.values() for name in panel))
    columns = min(len(lines), 3)
    rows = -(-len(lines) // columns)
    with style():
        figure = Figure(figsize=(WIDTH, 0.8 + 2.1 * rows + 0.1 * len(names)), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (title, own) in zip(panels.flat, lines.items(), strict=False):
            axes.set_title(plain(title))
            for name, cells in own.items():
                which = names.index(name)
                cells = sorted(cells, key=lambda cell: float(cell.level(x)))
                found = [sweep.interval(cell, measure) for cell in cells]
                places = [float(cell.level(x)) for cell in cells]
                mean = np.array([interval.mean for interval in found])
                spread = [mean - [i.low for i in found], [i.high for i in found] - mean]
                axes.errorbar(
                    places, mean, np.nan_to_num(spread), color=COLOURS[which % len(COLOURS)],
                    linestyle=DASHES[which // len(COLOURS) % len(DASHES)], marker=MARKERS[which % len(MARKERS)],
                    label=plain(name),
                )  # fmt: skip
        numbers = [float(level.name) for level in sweep.spec.factors()[x]]
        if min(numbers) > 0 and max(numbers) > 100 * min(numbers):
            panels[0, 0].set_xscale("log")
        elif all(number == int(number) for number in numbers):
            panels[0, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axes in panels.flat[len(lines) :]:
            axes.set_visible(False)
        for axes in panels.flat[max(0, len(lines) - columns) : len(lines)]:
            axes.set_xlabel(plain(x))
        figure.supylabel(measure_name(measure), fontsize=9)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        if len(names) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(names)))
        return figure


def cost_measure(sweep: Sweep) -> str | None:
    """The first cost among the measures, else the first that trials know; None where they know none."""
    known = dict.fromkeys(
        name for trial in sweep.trials for name, value in sweep.numbers(trial).items() if value
    )
    return next((name for name in (*sweep.spec.measures, *COST) if name in COST and name in known), None)


def cost_figure(sweep: Sweep, score: str, cost: str) -> Figure:
    """The score of every cell against its cost: colour one factor, shape another."""
    cells = [cell for cell in sweep.cells() if not math.isnan(sweep.interval(cell, score).mean)]
    factor, levels = _coloured(cells)
    other, shapes = next(
        (
            (name, names)
            for name, names in _levels(cells).items()
            if name != factor and 1 < len(names) <= len(MARKERS)
        ),
        ("", [""]),
    )
    with style():
        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        axes = figure.subplots()
        costs = []
        for cell in cells:
            found, where = sweep.interval(cell, score), sweep.interval(cell, cost).mean
            colour = COLOURS[levels.index(dict(cell.levels).get(factor, "")) % len(COLOURS)]
            shape = MARKERS[shapes.index(cell.level(other) if other else "")]
            costs.append(where)
            if not math.isnan(found.low):
                axes.plot([where] * 2, [found.low, found.high], color=colour, lw=1, alpha=0.6)
            axes.plot(where, found.mean, shape, color=colour, ms=5.5, mec="white", mew=0.6)
        positive = [value for value in costs if value > 0]
        if positive and len(positive) == len(costs) and max(positive) > 20 * min(positive):
            axes.set_xscale("log")
        axes.set_xlabel(measure_name(cost))
        axes.set_ylabel(measure_name(score))
        handles = [
            _handle("o", COLOURS[i % len(COLOURS)], f"{factor}: {name}") for i, name in enumerate(levels)
        ]
        handles += [
            _handle(MARKERS[i], REFERENCE_GREY, f"{other}: {name}") for i, name in enumerate(shapes) if other
        ]
        if len(handles) > 1 and len(handles) <= len(COLOURS) + len(MARKERS):
            figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return figure


def _handle(marker: str, colour: str, label: str) -> Line2D:
    return Line2D([], [], ls="", marker=marker, color=colour, ms=5.5, label=plain(label))


def _levels(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """The levels of each factor that all cells have."""
    factors = [factor for factor, _ in cells[0].levels] if cells else []
    common = [factor for factor in factors if all(factor in dict(cell.levels) for cell in cells)]
    return {factor: list(dict.fromkeys(cell.level(factor) for cell in cells)) for factor in common}


def _cut(spread: Mapping[str, Spread]) -> bool:
    """Whether residuals are larger than what is drawn."""
    return any((v > CUT).any() for name, each in spread.items() if "residual" in name for v in each.values())


Spread = dict[str, NDArray[np.float64]]  # values by the name of the cell


def distributions(sweep: Sweep) -> dict[str, Spread]:
    """Steps and residuals of the first cells, over all of their trials; of those that any trial records.

    Iterations to the tolerance and last residuals of every problem where trials keep the course of their residuals,
    else the numbers that each epoch has of them. A problem that does not get there counts with all of its iterations.
    """
    found: dict[str, Spread] = {}
    cells = sweep.cells()
    for cell in cells if len(cells) <= LINES else cells[:ENDS]:
        own: dict[str, list[NDArray[np.float64]]] = {}
        for trial, record in zip(sweep.trials, sweep.records, strict=True):
            if trial.cell == cell and record is not None and record["failure"] is None:
                for name, values in _spread_of(sweep, trial, record).items():
                    own.setdefault(name, []).append(values)
        for name, parts in own.items():
            found.setdefault(name, {})[_short(sweep, cell)] = np.concatenate(parts)
    # One value a cell is in the tables.
    return {
        name: found[name] for name in DISTRIBUTIONS if any(len(v) > 1 for v in found.get(name, {}).values())
    }


def _spread_of(sweep: Sweep, trial: SweepTrial, record: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    path = Path(sweep.spec.out) / record["folder"] / RESIDUALS
    if path.exists():
        with np.load(path) as layers:
            course = np.asarray(layers[layers.files[0]], dtype=np.float64)  # (iterations, problems)
        steps = iterations_to(torch.from_numpy(course), trial.given.iterations["tolerance"]).numpy()
        ends = np.where(np.isnan(course), 0, np.arange(len(course))[:, None]).max(0)
        return {
            "iterations": np.where(np.isnan(steps), float(len(course)), steps),
            # NaN follows an exact solution.
            "residual": course[ends, np.arange(course.shape[1])],
        }
    known = {
        name: np.array(
            [value for value in record["curves"].get(name, []) if value is not None], dtype=np.float64
        )
        for name in ("steps", "residual_max")
    }
    return {name: values for name, values in known.items() if len(values)}


def distributions_figure(spread: Mapping[str, Spread]) -> Figure:
    """One panel a number, one line a cell."""
    names = list(dict.fromkeys(name for values in spread.values() for name in values))
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(spread), sharey=True, squeeze=False)[0]
        for axes, (number, by_cell) in zip(panels, spread.items(), strict=True):
            for place, name in enumerate(names):
                values = by_cell.get(name, np.array([]))
                values = values[np.isfinite(values)]
                if "residual" in number:
                    values = np.minimum(values, CUT)
                if len(values):
                    low, q1, middle, q3, high = np.quantile(values, [0.025, 0.25, 0.5, 0.75, 0.975])
                    axes.plot([low, high], [place] * 2, color=COLOURS[0], lw=0.9)
                    axes.plot([q1, q3], [place] * 2, color=COLOURS[0], lw=3, solid_capstyle="butt")
                    axes.plot(middle, place, "o", color=COLOURS[1], ms=4, mec="white", mew=0.5)
            positive = [v[np.isfinite(v) & (v > 0)] for v in by_cell.values()]
            if "residual" in number and any(len(v) for v in positive):
                axes.set_xscale("log")
            axes.set_xlabel(DISTRIBUTIONS[number])
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False, axis="y")
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        return figure


def _residuals(sweep: Sweep) -> dict[str, NDArray[np.float64]]:
    """Of the first cells, by name, as the trials of the first seed left them: (iterations, problems)."""
    found: dict[str, NDArray[np.float64]] = {}
    trials = {
        (trial.cell, trial.seed): (trial, record)
        for trial, record in zip(sweep.trials, sweep.records, strict=True)
        if record is not None
    }
    for cell in sweep.cells():
        trial, record = trials.get((cell, sweep.spec.seeds[0]), (None, None))
        if len(found) == PANELS or trial is None or record is None or not sweep.numbers(trial):
            continue
        path = Path(sweep.spec.out) / record["folder"] / RESIDUALS
        if path.exists():
            with np.load(path) as layers:
                # Of several layers the first; none has been swept with more than one.
                found[_short(sweep, cell)] = layers[layers.files[0]]
    return found


def _short(sweep: Sweep, cell: Cell) -> str:
    """The levels of the factors that have several."""
    several = [factor for factor, levels in _levels(sweep.cells()).items() if len(levels) > 1]
    return plain(" ".join(name for factor, name in cell.levels if factor in several) or cell.name)


def plain(name: str) -> str:
    """A name as it stands: between dollars a picture would set formulas."""
    return name.replace("$", r"\$")
