"""Pictures of what Sparse Distributed Memories recall, and of the betas that trained attention has, from arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from hopdeq_lwpf.plots.common import DASHES, MARKERS, REFERENCE_GREY, WIDTH, Row, style
from hopdeq_lwpf.plots.sdm import LINES, legend_columns, not_empty

PANELS = 3  # side by side


def recall_noise_figure(
    rows: Sequence[Row], *, x: str = "flips", y: str = "cosine", label: str = "cosine with the target"
) -> Figure:
    """Recall against noise, one panel a radius, one line an algorithm: mean and range over the data sets.

    rows: mappings with the columns algorithm, radius, `x` and `y`; rows that agree in the first three are data sets,
    whose smallest and largest value are the ends of the bar. label: of the vertical axis. Raises ValueError for rows
    that lack a column.
    """
    if not rows:
        raise ValueError("rows must hold at least one row")
    for column in ("algorithm", "radius", x, y):
        if any(column not in row for row in rows):
            raise ValueError(f"rows need a column {column!r}; there is {sorted(rows[0])}")
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    radii = list(dict.fromkeys(row["radius"] for row in rows))
    with style():
        columns = min(len(radii), PANELS)
        lines = -(-len(radii) // columns)
        legend = legend_columns(names)
        height = 0.5 + 2.2 * lines + 0.2 * -(-len(names) // legend)
        figure = Figure(figsize=(WIDTH if columns > 1 else 0.7 * WIDTH, height), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, radius in zip(panels.flat, radii, strict=False):
            here = [row for row in rows if row["radius"] == radius]
            _draw_recall(axes, here, names, x, y)
            axes.set_title(f"$d$ = {radius}")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for axes in panels.flat[len(radii) :]:
            axes.set_visible(False)
        for axes in panels[:, 0]:
            axes.set_ylabel(label)
        for axes in panels.flat[max(len(radii) - columns, 0) : len(radii)]:
            axes.set_xlabel("bits flipped" if x == "flips" else x)
        handles = [Line2D([], [], label=name, **_recall_style(number)) for number, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside lower center", ncols=legend)
        return figure


def _draw_recall(axes: Any, rows: Sequence[Row], names: Sequence[str], x: str, y: str) -> None:
    places = sorted({row[x] for row in rows})
    gap = min(np.diff(places), default=1.0)
    for number, name in enumerate(names):
        points = {
            place: [row[y] for row in rows if row[x] == place and row["algorithm"] == name]
            for place in places
        }
        points = {place: values for place, values in points.items() if values}
        middle = np.array([np.mean(values) for values in points.values()])
        ends = np.array([(min(values), max(values)) for values in points.values()]).reshape(-1, 2).T
        # Side by side, since lines that agree would hide each other.
        shift = gap * 0.3 * ((number + 0.5) / len(names) - 0.5)
        axes.errorbar(
            np.array(list(points)) + shift,
            middle,
            yerr=np.clip([middle - ends[0], ends[1] - middle], 0, None),
            elinewidth=0.8,
            **_recall_style(number),
        )


def _recall_style(number: int) -> dict[str, Any]:
    return {
        "color": LINES[number % len(LINES)],
        "linestyle": ("-", *DASHES)[number % 4],
        "marker": MARKERS[number % len(MARKERS)],
        "markerfacecolor": "white" if number % 2 else LINES[number % len(LINES)],
    }


def effective_beta_figure(
    betas: Mapping[str, ArrayLike], lines: Mapping[str, float] | None = None, *, bins: int = 40
) -> Figure:
    """Histograms of effective betas on a logarithmic axis, one outline a name, beside those of the optimal radii.

    betas: arrays by name; what is not above 0 and finite is left out. lines: betas by name, each a dotted line with its
    name. bins: of the histogram, whose first and last one hold what lies beyond, half a per cent on either side.
    Raises ValueError where no beta is left.
    """
    kept = {}
    for name, values in not_empty(betas).items():
        array = np.asarray(values, dtype=np.float64).reshape(-1)
        kept[name] = array[np.isfinite(array) & (array > 0)]
    marks = list((lines or {}).values())
    everything = np.concatenate(list(kept.values()))
    if not everything.size:
        raise ValueError("betas holds no finite number above 0")
    low, high = np.quantile(everything, [0.005, 0.995])
    edges = np.geomspace(min(low, *marks, low) / 1.1, max(high, *marks, high) * 1.1, bins + 1)
    with style():
        figure = Figure(figsize=(0.8 * WIDTH, 3.3), layout="constrained")
        axes = figure.subplots()
        for number, values in enumerate(kept.values()):
            axes.hist(
                np.clip(values, edges[0], edges[-1]),
                edges.tolist(),
                weights=np.full(values.shape, 100 / max(values.size, 1)),
                histtype="step",
                color=LINES[number % len(LINES)],
                linestyle=("-", *DASHES)[number % 4],
                lw=1.6,
            )
        if lines:
            axes.set_ylim(top=1.6 * axes.get_ylim()[1])  # room for the names
        for name, place in (lines or {}).items():
            axes.axvline(place, color=REFERENCE_GREY, lw=0.9, ls=":")
            axes.text(
                place, 0.98, name, rotation=90, ha="right", va="top", color="#444444", fontsize=8,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(r"effective $\beta$")
        axes.set_ylabel("queries (%)")
        handles = [
            Line2D([], [], color=LINES[i % len(LINES)], linestyle=("-", *DASHES)[i % 4], lw=1.6, label=name)
            for i, name in enumerate(kept)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns(list(kept)))
        return figure
