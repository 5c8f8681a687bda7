"""Pictures of how solves converge, from the relative residuals of each iteration."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from hopdeq_lwpf.plots.common import COLOURS, DASHES, SPARE_COLOURS, WIDTH, style

Floats: TypeAlias = NDArray[np.float64]
Residuals: TypeAlias = ArrayLike | Mapping[str, ArrayLike]

TOLERANCE = 1e-4  # of Goemaere et al. 2024, table 2
BINS = 8  # a decade: fine enough for a slope, coarse enough for some hundred problems
PANELS = 4  # side by side
LOGARITHMIC = 5.0  # per cent: where smaller shares are to be told apart, a linear axis would not
CHARACTERS = 13  # of the text in an inch
LINES = (*COLOURS.values(), *SPARE_COLOURS)


def residual_heatmap(residuals: Residuals, *, tolerance: float = TOLERANCE, title: str = "") -> Figure:
    """Where the relative residuals of all problems stand after each iteration, one panel a name.

    The picture of Goemaere et al. 2024, figures 3 and 4. A column is a histogram: its colours say which share of all
    problems has that residual then, so that it fades as problems stop. The white marker stands at the tolerance, above
    the mean number of iterations of those problems that get below it. The number is written above the panel; where
    some never do, their share is too.

    residuals: (T, B), or a mapping from the names of the panels; arrays or tensors on the CPU, such as
        `Solution.trace.residual` or `training.ConvergenceMonitor.residuals`. Row t belongs to the state after t
        iterations; NaN once a problem has stopped. Exact solutions (0) are drawn at the lower edge, inf at the upper.
    tolerance: of the relative residual; 1e-4 as in the paper. title: above all panels.

    Raises TypeError or ValueError for residuals of another shape, negative ones, none that is finite, and a tolerance
    that is not > 0.
    """
    named = _named(residuals, tolerance)
    edges = _edges(named, tolerance)
    with style():
        columns = min(len(named), PANELS)
        lines = -(-len(named) // columns)
        width = WIDTH if columns > 1 else 0.6 * WIDTH
        figure = Figure(figsize=(width, 0.7 + 2.2 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        most = max(values.shape[1] for values in named.values())
        norm = LogNorm(100 / max(most, 10), 100, clip=True)
        mesh: Any = None
        for axes, (name, values) in zip(panels.flat, named.items(), strict=False):
            mesh = _draw_density(axes, values, edges, norm)
            told = _draw_marker(axes, values, tolerance)
            wrapped = textwrap.wrap(name, int(0.85 * width / columns * CHARACTERS))
            axes.set_title("\n".join([*wrapped, told]))
        _label(panels, len(named))
        longest = max(len(values) for values in named.values())
        panels[0, 0].set_xlim(-0.5, longest - 0.5)
        panels[0, 0].set_ylim(edges[0], edges[-1])
        panels[0, 0].yaxis.set_major_locator(MaxNLocator(7, integer=True))
        panels[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:.0f}}}$"))
        for axes in panels[:, 0]:
            axes.set_ylabel("relative residual")
        bar = figure.colorbar(mesh, ax=panels, pad=0.015, aspect=18 * lines)
        bar.set_label("problems (%)")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        if title:
            figure.suptitle(title, fontsize=10)
        return figure


def not_converged_figure(residuals: Residuals, *, tolerance: float = TOLERANCE, title: str = "") -> Figure:
    """The share of the problems whose residual has not been below the tolerance yet, over iterations.

    One line a name; from a share of 5 % on a logarithmic scale, since the last ones decide how long a batch takes: a
    line that leaves at the lower edge then has reached 0. Arguments and errors are those of `residual_heatmap`; a
    problem that stops above the tolerance never gets there.
    """
    named = _named(residuals, tolerance)
    with style():
        room = int(0.7 * WIDTH * CHARACTERS / (max(map(len, named)) + 7))  # names in a line of the legend
        columns = max(1, min(len(named), room))
        figure = Figure(figsize=(0.7 * WIDTH, 2.6 + 0.2 * -(-len(named) // columns)), layout="constrained")
        axes = figure.subplots()
        shares = {name: 100 * _shares_left(values, tolerance) for name, values in named.items()}
        positive = np.concatenate(list(shares.values()))
        least = min(positive[positive > 0], default=100.0)
        for number, (name, left) in enumerate(shares.items()):
            axes.plot(
                np.arange(len(left)),
                np.maximum(left, least / 10) if least < LOGARITHMIC else left,
                drawstyle="steps-post",
                color=LINES[number % len(LINES)],
                # Lines that agree would hide each other.
                linestyle=("-", *DASHES)[number % (len(DASHES) + 1)],
                label=name,
            )
        if least < LOGARITHMIC:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(*((0.7 * least, 130) if least < LOGARITHMIC else (-4, 104)))
        axes.set_xlim(0, max(len(values) for values in named.values()) - 1 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("iterations")
        axes.set_ylabel(f"not yet below {_power(tolerance)} (%)")
        if any(named):
            figure.legend(loc="outside lower center", ncols=columns)
        if title:
            axes.set_title(title)
        return figure


def _named(residuals: Residuals, tolerance: float) -> dict[str, Floats]:
    """The residuals by name, checked; "" where there is only one array."""
    if not tolerance > 0 or not np.isfinite(tolerance):
        raise ValueError(f"tolerance must be a finite number > 0, got {tolerance!r}")
    given = residuals if isinstance(residuals, Mapping) else {"": residuals}
    if not given:
        raise ValueError("residuals is an empty mapping; give at least one name -> (T, B)")
    found = {}
    for name, values in given.items():
        label = f"residuals[{name!r}]" if isinstance(residuals, Mapping) else "residuals"
        try:
            array = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{label} must be an array of numbers or a tensor on the CPU, got a {type(values).__name__}"
            ) from error
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"{label} must have shape (T, B), iterations by problems, got {array.shape}")
        if (array < 0).any():
            raise ValueError(
                f"{label} has negative entries; give the residuals themselves, not their logarithm"
            )
        if not np.isfinite(array).any():
            raise ValueError(f"{label} has no finite entry, so that there is nothing to draw")
        found[str(name)] = array
    return found


def _first_below(values: Floats, tolerance: float) -> Floats:
    """The first iteration after which each problem is below the tolerance, NaN where it never is: (T, B) -> (B,)."""
    below = values < tolerance
    return np.where(below.any(0), below.argmax(0), np.nan)


def _shares_left(values: Floats, tolerance: float) -> Floats:
    """The share of problems that have not been below the tolerance after 0, 1, ... iterations, (T,)."""
    return 1 - np.logical_or.accumulate(values < tolerance).mean(1)


def _edges(named: Mapping[str, Floats], tolerance: float) -> Floats:
    """Edges of the bins in log10, on whole decades, around all that is positive and finite, and the tolerance."""
    every = [values[np.isfinite(values) & (values > 0)] for values in named.values()]
    logs = np.log10(np.concatenate([*every, [tolerance]]))
    low, high = np.floor(logs.min()), np.ceil(logs.max())
    low, high = min(low, np.floor(np.log10(tolerance)) - 1), max(high, low + 2)
    return np.linspace(low, high, round((high - low) * BINS) + 1)


def _density(values: Floats, edges: Floats) -> Floats:
    """The share of all problems in each bin after each iteration, in per cent: (T, B) -> (bins, T)."""
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log10(values), edges[0], edges[-1])  # NaN stays
    columns = [np.histogram(row[~np.isnan(row)], edges)[0] for row in logs]
    return 100 * np.stack(columns, 1) / values.shape[1]


def _draw_density(axes: Any, values: Floats, edges: Floats, norm: LogNorm) -> Any:
    density = _density(values, edges)
    axes.grid(visible=False)
    return axes.pcolormesh(
        np.arange(density.shape[1] + 1) - 0.5,
        edges,
        np.ma.masked_equal(density, 0),
        cmap=_shades(),
        norm=norm,
        rasterized=True,  # thousands of rectangles in an SVG otherwise
    )


def _shades() -> Colormap:
    """One hue from pale to dark, which prints and is even for the colour-blind; the palest still differs from paper."""
    return ListedColormap(mpl.colormaps["Blues"](np.linspace(0.25, 1, 256)))


def _draw_marker(axes: Any, values: Floats, tolerance: float) -> str:
    """The tolerance, and the marker on it; returns what there is to say of it."""
    first = _first_below(values, tolerance)
    height = np.log10(tolerance)
    axes.axhline(height, color="black", lw=0.7, ls="--")
    never = np.isnan(first)
    if never.all():
        return "never below"
    mean = first[~never].mean()
    marker = {"marker": "D", "color": "white", "markeredgecolor": "black", "mew": 1.0, "ms": 6}
    axes.plot(mean, height, zorder=5, clip_on=False, **marker)
    return f"{mean:.1f}" + (f" ({100 * never.mean():.2g} % never)" if never.any() else "")


def _label(panels: NDArray[Any], count: int) -> None:
    """Iterations under the lowest panel of each column; the places without a panel stay empty."""
    columns = panels.shape[1]
    for number, axes in enumerate(panels.flat):
        axes.set_visible(number < count)
        if count - columns <= number < count:
            axes.set_xlabel("iterations")
            axes.xaxis.set_tick_params(labelbottom=True)
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _power(value: float) -> str:
    """1e-4 as $10^{-4}$, other numbers as they are written."""
    exponent = np.log10(value)
    return f"$10^{{{exponent:.0f}}}$" if np.isclose(exponent, round(exponent)) else f"{value:g}"
