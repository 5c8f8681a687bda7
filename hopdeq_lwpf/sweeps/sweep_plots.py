"""Pictures of a sweep, from its numbers and the residuals that its trials left; each returns a Figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hopdeq_lwpf import plots
from hopdeq_lwpf.plots import WIDTH, style
from hopdeq_lwpf.sweeps.engine import FOLDERS
from hopdeq_lwpf.sweeps.sweep_results import Sweep, measure_name
from hopdeq_lwpf.sweeps.sweep_spec import Cell
from hopdeq_lwpf.training.run import RESIDUALS

# Okabe and Ito's palette, by the last factor that has several levels.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v")
LINES = 60  # cells below each other that are still readable
PANELS = 8  # heat maps in one picture that are still readable


def draw(sweep: Sweep) -> dict[str, tuple[str, Figure]]:
    """Every picture that there are numbers for: (caption, figure) by name."""
    spec, figures = sweep.spec, {}
    small = len(spec.cells()) <= LINES
    known = [m for m in spec.measures if any(not np.isnan(sweep.values(c, m)).all() for c in spec.cells())]
    if known and small:
        figures["measures"] = (
            f"Small dots: seeds; large ones: their mean, with its {100 * spec.confidence:g} % interval. Colour: the "
            "last factor.",
            measures_figure(sweep, known),
        )
    if spec.x is not None and known:
        figures["course"] = (
            f"Mean {measure_name(known[0])} against {spec.x}, with its {100 * spec.confidence:g} % interval.",
            course_figure(sweep, known[0], spec.x),
        )
    residuals = _residuals(sweep)
    if residuals:
        some = f" of the first {len(residuals)} cells" if len(residuals) < len(spec.cells()) else ""
        tolerance = next(t.given.iterations["tolerance"] for t in sweep.trials if t.given.iterations)
        figures["residuals"] = (
            f"Relative residuals{some} over the iterations after training, validation problems, seed {spec.seeds[0]}: "
            "the colour is the share of problems, the marker the mean number of iterations to the tolerance.",
            plots.residual_heatmap(residuals, tolerance=tolerance),
        )
        figures["not_converged"] = (
            f"Share of validation problems{some} that have not met the tolerance yet, seed {spec.seeds[0]}.",
            plots.not_converged_figure(residuals, tolerance=tolerance),
        )
    return figures


def measures_figure(sweep: Sweep, measures: Sequence[str]) -> Figure:
    """One panel a measure, one line a cell."""
    cells = sweep.spec.cells()
    levels = list(dict.fromkeys(cell.levels[-1][1] for cell in cells)) if cells[0].levels else [""]
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(cells)), layout="constrained")
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            for place, cell in enumerate(cells):
                level = cell.levels[-1][1] if cell.levels else ""
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
    for cell in sweep.spec.cells():
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


def _residuals(sweep: Sweep) -> dict[str, NDArray[np.float64]]:
    """Of the first cells, by name, as the trials of the first seed left them: (iterations, problems)."""
    found: dict[str, NDArray[np.float64]] = {}
    trials = {(trial.cell, trial.seed): trial for trial in sweep.trials}
    for cell in sweep.spec.cells():
        trial = trials[cell, sweep.spec.seeds[0]]
        path = Path(sweep.spec.out) / FOLDERS / trial.folder / RESIDUALS
        if len(found) < PANELS and sweep.numbers(trial) and path.exists():
            with np.load(path) as layers:
                # Of several layers the first; none has been swept with more than one.
                found[_short(sweep, cell)] = layers[layers.files[0]]
    return found


def _short(sweep: Sweep, cell: Cell) -> str:
    """The levels of the factors that have several."""
    several = [factor for factor, levels in sweep.spec.factors().items() if len(levels) > 1]
    return plain(" ".join(cell.level(factor) for factor in several) or cell.name)


def plain(name: str) -> str:
    """A name as it stands: between dollars a picture would set formulas."""
    return name.replace("$", r"\$")
