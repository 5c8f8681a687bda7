"""Pictures of a comparison of retrievals, from its table: recall, steps, energies, states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from hopdeq_lwpf.plots.common import (
    DASHES,
    KIND_NAMES,
    MARKERS,
    REFERENCE_GREY,
    UNIT_NAMES,
    WIDTH,
    Row,
    style,
    unit_colour,
)


def _ordered(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def steps_name(steps: object) -> str:
    return "converged" if steps == "converged" else f"{steps} step" + "s" * (steps != 1)


def _draw_series(axes: Any, rows: Sequence[Row], x: str, y: str) -> None:
    """One line for each unit and number of steps, with the interval of each point."""
    units, steps = _ordered(rows, "forgetting"), _ordered(rows, "steps")
    places = sorted({row[x] for row in rows})
    gap = min(np.diff(places), default=1.0)
    series = [(unit, step) for unit in units for step in steps]
    for number, (unit, step) in enumerate(series):
        points = sorted(
            (r for r in rows if (r["forgetting"], r["steps"]) == (unit, step)), key=lambda r: r[x]
        )
        # Side by side, since lines that agree would hide each other.
        shift = gap * 0.4 * ((number + 0.5) / len(series) - 0.5)
        middle = np.array([point[y] for point in points])
        spread = [middle - [p[f"{y}_low"] for p in points], [p[f"{y}_high"] for p in points] - middle]
        which = steps.index(step)
        axes.errorbar(
            np.array([point[x] for point in points]) + shift,
            100 * middle,
            yerr=100 * np.clip(spread, 0, None),
            color=unit_colour(unit, units),
            linestyle="-" if step == "converged" else DASHES[which % len(DASHES)],
            marker=MARKERS[which % len(MARKERS)],
            markerfacecolor=unit_colour(unit, units) if step == "converged" else "white",
            elinewidth=0.7,
            capsize=0,
        )


def _series_legend(figure: Figure, rows: Sequence[Row], extra: Sequence[Line2D]) -> None:
    units, steps = _ordered(rows, "forgetting"), _ordered(rows, "steps")
    colours = [Line2D([], [], color=unit_colour(u, units), lw=3, label=UNIT_NAMES.get(u, u)) for u in units]
    lines = []
    for which, step in enumerate(steps):
        lines.append(
            Line2D(
                [],
                [],
                color="black",
                linestyle="-" if step == "converged" else DASHES[which % len(DASHES)],
                marker=MARKERS[which % len(MARKERS)],
                markerfacecolor="black" if step == "converged" else "white",
                label=steps_name(step),
            )
        )
    second = [*lines, *extra]
    columns = max(len(colours), len(second))
    blank = Line2D([], [], linestyle="none", label=" ")
    first = [*colours, *[blank] * (columns - len(colours))]
    second += [blank] * (columns - len(second))
    # A legend fills column by column; in pairs, the units make its first line and the steps its second.
    pairs = [handle for pair in zip(first, second, strict=True) for handle in pair]
    figure.legend(handles=pairs, loc="outside lower center", ncols=columns)


def recall_figure(rows: Sequence[Row]) -> Figure:
    """Recall against the strength of the corruption: one column a kind, one row a beta.

    rows: of the results table, with levels. The grey line is a nearest-neighbour search for the query.
    """
    kinds, betas = _ordered(rows, "corruption"), _ordered(rows, "beta")
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 1.45 * len(betas)), layout="constrained")
        panels = figure.subplots(len(betas), len(kinds), sharex="col", sharey=True, squeeze=False)
        for i, beta in enumerate(betas):
            for j, kind in enumerate(kinds):
                here = [row for row in rows if row["beta"] == beta and row["corruption"] == kind]
                axes = panels[i, j]
                query = sorted({row["level"]: row["nearest_query"] for row in here}.items())
                axes.plot(*np.array([(level, 100 * share) for level, share in query]).T, color=REFERENCE_GREY)
                _draw_series(axes, here, "level", "recall")
                axes.set_ylim(-4, 104)
                axes.set_yticks([0, 25, 50, 75, 100])
                axes.set_xticks([level for level, _ in query])
                if i == 0:
                    axes.set_title(KIND_NAMES.get(kind, (kind, ""))[0])
                if i == len(betas) - 1:
                    axes.set_xlabel(KIND_NAMES.get(kind, ("", "level"))[1])
            panels[i, 0].set_ylabel(f"$\\beta$ = {beta:g}\nrecalled (%)")
        grey = Line2D([], [], color=REFERENCE_GREY, label="nearest neighbour of the query")
        _series_legend(figure, rows, [grey])
        return figure


def beta_figure(rows: Sequence[Row], column: str = "recall", label: str = "recalled (%)") -> Figure:
    """A share of the table (in per cent, with intervals) against beta, for queries without levels."""
    betas = sorted(set(_ordered(rows, "beta")))
    with style():
        figure = Figure(figsize=(0.7 * WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        spots = [{**row, "place": betas.index(row["beta"])} for row in rows]
        _draw_series(axes, spots, "place", column)
        axes.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        axes.set_xlabel("inverse temperature $\\beta$")
        axes.set_ylabel(label)
        axes.set_ylim(-4, 104)
        _series_legend(figure, rows, [])
        return figure


def steps_figure(steps: Mapping[tuple[str, float], NDArray[np.int64]], limit: int) -> Figure:
    """How many steps the queries took to converge: one panel a beta, one outline a unit.

    steps: of each query, by (forgetting, beta). limit: the step limit; what stands there did not converge.
    """
    units, betas = list(dict.fromkeys(u for u, _ in steps)), list(dict.fromkeys(b for _, b in steps))
    most = max(int(values.max()) for values in steps.values())
    bins = _log_bins(most)
    with style():
        columns = min(len(betas), 4)
        lines = -(-len(betas) // columns)
        figure = Figure(figsize=(WIDTH, 0.5 + 1.9 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, beta in zip(panels.flat, betas, strict=False):
            for width, unit in zip(np.linspace(2.6, 1.0, len(units)), units, strict=True):
                values = steps[unit, beta]
                share = np.full(values.shape, 100 / max(values.size, 1))
                axes.hist(
                    values, bins, weights=share, histtype="step", color=unit_colour(unit, units), lw=width
                )
            axes.set_xscale("log")
            axes.set_xlim(0.9, 1.3 * most)
            axes.set_title(f"$\\beta$ = {beta:g}")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            if most >= limit:
                axes.axvline(limit, color=REFERENCE_GREY, lw=0.8, ls=":")
        for axes in panels.flat[len(betas) :]:
            axes.set_visible(False)
        for axes in panels[:, 0]:
            axes.set_ylabel("queries (%)")
        for axes in panels.flat[max(len(betas) - columns, 0) : len(betas)]:
            axes.set_xlabel("steps")
        handles = [
            Line2D([], [], color=unit_colour(u, units), lw=2, label=UNIT_NAMES.get(u, u)) for u in units
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        return figure


def _log_bins(most: int) -> NDArray[np.float64]:
    """Edges between whole numbers, as even as these allow on a logarithmic axis."""
    edges = np.unique(np.round(np.geomspace(1, most + 1, 28)))
    return np.append(edges, edges[-1] + 1) - 0.5


def energy_figure(courses: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Energy above its final value along plain trajectories, one panel a unit, one line a query.

    courses: (T, B) energies by unit, NaN after a query has stopped.
    """
    units = list(courses)
    with style():
        figure = Figure(figsize=(WIDTH, 2.5), layout="constrained")
        panels = figure.subplots(1, len(units), sharex=True, sharey=True, squeeze=False)[0]
        for axes, unit in zip(panels, units, strict=True):
            energies = courses[unit]
            for course in energies.T:
                course = course[~np.isnan(course)]
                axes.plot(np.arange(len(course)), course, color=unit_colour(unit, units), alpha=0.55, lw=0.9)
                axes.plot(len(course) - 1, course[-1], ".", color=unit_colour(unit, units), ms=5)
            axes.set_title(UNIT_NAMES.get(unit, unit))
            axes.set_xscale("symlog", linthresh=1)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlabel("iteration")
        panels[0].set_ylabel("energy $E(z)$")
        return figure


def picture_grid(
    lines: Sequence[tuple[str, NDArray[np.float64]]],
    titles: Sequence[str],
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """A grid of pictures: one line a stage, one column a query.

    lines: (label, (n, height, width)); titles: one a column; of equal neighbours only the first is written.
    """
    count = len(titles)
    with style():
        size = min(0.72, (WIDTH - 1.1) / count)
        figure = Figure(figsize=(1.1 + size * count, 0.3 + size * len(lines)), layout="constrained")
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
        panels = figure.subplots(len(lines), count, squeeze=False)
        for i, (label, pictures) in enumerate(lines):
            for j in range(count):
                axes = panels[i, j]
                axes.imshow(pictures[j], cmap="gray_r", vmin=limits[0], vmax=limits[1])
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(visible=False)
                for spine in axes.spines.values():
                    spine.set(visible=True, linewidth=0.5, color="#aaaaaa")
                if i == 0 and (j == 0 or titles[j] != titles[j - 1]):
                    axes.set_title(titles[j], loc="left", fontsize=8.5)
            panels[i, 0].set_ylabel(label, rotation=0, ha="right", va="center")
        return figure
