"""Pictures of states on a curve: where they are, their graph, and how far they are from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from hopdeq_lwpf.plots.common import COLOURS, REFERENCE_GREY, SPARE_COLOURS, WIDTH, style

Floats = NDArray[np.float64]
COLUMNS = 3


def curve_figure(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike | None]], curve: ArrayLike, *, colour: str = "none"
) -> Figure:
    """Points near a closed curve, one panel a stage, in the plane that shows most of the curve.

    panels: title -> (points (N, d), edges (2, E) or None), where the edges join points of that panel. curve (M, d): the
    curve itself, in order. All are projected on the first two principal directions of the curve, and all panels have
    one scale. colour: of the points, a name in the palette of units. Raises ValueError where there is no panel or
    widths differ.
    """
    line = np.asarray(curve, dtype=np.float64)
    named = {
        title: (np.asarray(points, dtype=np.float64), edges) for title, (points, edges) in panels.items()
    }
    if not named:
        raise ValueError("panels is empty: give the points of at least one stage")
    for title, (points, _) in named.items():
        if points.ndim != 2 or points.shape[1:] != line.shape[1:]:
            raise ValueError(
                f"{title!r}: points must be (N, {line.shape[-1]}) as the curve is, got {points.shape}"
            )
    center = line.mean(0)
    directions = np.linalg.svd(line - center, full_matrices=False)[2][:2].T
    around = np.vstack([line, line[:1]]) @ directions - center @ directions
    flat = {title: (points - center) @ directions for title, (points, _) in named.items()}
    reach = 1.05 * max(float(np.abs(part).max()) for part in (around, *flat.values()))
    rows = -(-len(named) // COLUMNS)
    columns = min(len(named), COLUMNS)
    with style():
        figure = Figure(
            figsize=(WIDTH * columns / COLUMNS, WIDTH / COLUMNS * 1.1 * rows), layout="constrained"
        )
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (title, (_, edges)) in zip(grid.flat, named.items(), strict=False):
            axes.set_aspect("equal")
            axes.set_xlim(-reach, reach)
            axes.set_ylim(-reach, reach)
            axes.set_title(title)
            if edges is not None:
                ends = flat[title][np.asarray(edges).T]
                axes.add_collection(LineCollection(list(ends), colors="#bbbbbb", linewidths=0.4, zorder=1))
            axes.plot(*around.T, color=REFERENCE_GREY, linewidth=1.0, zorder=2)
            axes.scatter(*flat[title].T, s=7, color=COLOURS[colour], linewidths=0, zorder=3)
    return figure


def error_figure(
    errors: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]], *, label: str, x: str = "beta"
) -> Figure:
    """Errors against a number on a log axis, one panel a title, one line a name: mean over seeds, range shaded.

    errors: title -> name -> number -> one error a seed. Lower is better. Raises ValueError where there is nothing.
    """
    if not errors or not all(errors.values()):
        raise ValueError("errors is empty: give at least one title with one line")
    colours = (*COLOURS.values(), *SPARE_COLOURS)
    with style():
        figure = Figure(figsize=(WIDTH, 0.42 * WIDTH * -(-len(errors) // COLUMNS)), layout="constrained")
        grid = figure.subplots(
            -(-len(errors) // COLUMNS), min(len(errors), COLUMNS), squeeze=False, sharey="row"
        )
        handles = {}
        for number, (axes, (title, lines)) in enumerate(zip(grid.flat, errors.items(), strict=False)):
            for colour, (name, points) in zip(colours, lines.items(), strict=False):
                at = sorted(points)
                values = np.asarray([points[each] for each in at], dtype=np.float64)
                axes.fill_between(at, values.min(1), values.max(1), color=colour, alpha=0.15, linewidth=0)
                (handles[name],) = axes.plot(at, values.mean(1), color=colour, marker="o", label=name)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(x)
            axes.set_title(title)
            if number % COLUMNS == 0:
                axes.set_ylabel(label)
        for axes in grid.flat:
            axes.set_ylim(bottom=0)
        for axes in list(grid.flat)[len(errors) :]:
            axes.set_axis_off()
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    return figure
