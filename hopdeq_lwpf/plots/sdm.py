"""Pictures of Sparse Distributed Memory and of the attention that approximates it, from arrays.

Colour tells the Hamming radius or the algorithm, line and marker what is exact and what is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from hopdeq_lwpf.plots.common import (
    COLOURS,
    DASHES,
    MARKERS,
    REFERENCE_GREY,
    SPARE_COLOURS,
    WIDTH,
    style,
)

Floats: TypeAlias = NDArray[np.float64]

# Okabe and Ito's palette without its yellow, too pale for lines on white, and black last.
LINES = (*COLOURS.values(), *SPARE_COLOURS[:2], "#000000")
DISTANCE = "Hamming distance $d_v$ of query and pattern"
MARKS = 34  # markers on a line at most
LEGEND = 95  # characters in a line of a legend as wide as the page


def intersection_figure(
    log_shares: Mapping[int, ArrayLike],
    fits: Mapping[int, tuple[float, float]] | None = None,
    bounds: Mapping[int, tuple[ArrayLike, ArrayLike]] | None = None,
) -> Figure:
    """The shares of the space within two circles against the distance of their centres, one colour a radius.

    log_shares: ln of the shares, (n+1,) over distances 0..n, by radius; what is not finite is left out. fits: beta and
    bias of exp(beta cosine + bias) by radius; drawn solid where it was fitted, up to the radius, dashed beyond.
    bounds: ln of a lower and an upper bound, (n+1,) each, by radius; a band between the two, and nothing where one is
    not finite. Raises ValueError for arrays of another shape and for radii without shares.
    """
    curves = {
        radius: row_of(f"log_shares[{radius}]", values) for radius, values in not_empty(log_shares).items()
    }
    fits, bounds = fits or {}, bounds or {}
    for name, given in (("fits", fits), ("bounds", bounds)):
        if missing := [radius for radius in given if radius not in curves]:
            raise ValueError(f"{name} has radii {missing} that log_shares has not, {list(curves)}")
    with style():
        figure = Figure(figsize=(0.75 * WIDTH, 3.7), layout="constrained")
        axes = figure.subplots()
        ends: list[float] = []
        for number, (radius, values) in enumerate(curves.items()):
            colour, n = LINES[number % len(LINES)], len(values) - 1
            shares, distance = values / np.log(10), np.arange(n + 1)
            there = np.isfinite(shares)
            ends += [float(shares[there].min()), float(shares[there].max())]
            if radius in bounds:
                low, high = (row_of(f"bounds[{radius}]", part, n + 1) / np.log(10) for part in bounds[radius])
                both = np.isfinite(low) & np.isfinite(high) & there
                axes.fill_between(
                    distance, low, high, where=both.tolist(), color=colour, alpha=0.16, linewidth=0
                )
            axes.plot(
                distance[there],
                shares[there],
                MARKERS[number % len(MARKERS)],
                color=colour,
                markersize=3.2,
                markevery=max(1, -(-int(there.sum()) // MARKS)),
            )
            if radius in fits:
                _draw_fit(axes, radius, n, int(distance[there].max()), fits[radius], colour)
        room = 0.05 * (max(ends) - min(ends)) + 0.1
        axes.set_ylim(min(ends) - room, max(ends) + room)
        axes.set_xlim(left=-0.5)
        axes.set_xlabel(DISTANCE)
        axes.set_ylabel("share of the space")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:.0f}}}$"))
        first = [_marker(number, f"$d$ = {radius}") for number, radius in enumerate(curves)]
        second = [_dashes("-", "exponential fit"), _dashes("--", "beyond what was fitted")] if fits else []
        if bounds:
            second.append(Line2D([], [], color="black", alpha=0.16, lw=6, label="between bounds"))
        _two_lines(figure, first, second)
        return figure


def _draw_fit(axes: Any, radius: int, n: int, last: int, fit: tuple[float, float], colour: str) -> None:
    beta, bias = fit
    for start, stop, dashes in ((0, min(radius, last), "-"), (radius, last, "--")):
        distance = np.linspace(start, max(start, stop), 50)
        axes.plot(
            distance,
            (beta * (1 - 2 * distance / n) + bias) / np.log(10),
            dashes,
            color=colour,
            lw=1.0,
        )


def weights_figure(panels: Mapping[str, Mapping[str, ArrayLike]], *, least: float = 1e-8) -> Figure:
    """Normalised read weights against the distance, above on a linear axis and below on a logarithmic one.

    panels: title -> name of a line -> weights over distances 0, 1, ...; the first line of a panel is the exact one,
    drawn with markers. least: where the logarithmic axis ends. Raises ValueError for arrays of another shape and
    panels without lines.
    """
    drawn = {
        title: {
            name: row_of(f"panels[{title!r}][{name!r}]", values) for name, values in not_empty(lines).items()
        }
        for title, lines in not_empty(panels).items()
    }
    names = list(dict.fromkeys(name for lines in drawn.values() for name in lines))
    with style():
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axes = figure.subplots(2, len(drawn), sharex="col", sharey="row", squeeze=False)
        for column, (title, lines) in enumerate(drawn.items()):
            exact = next(iter(lines))
            end = 1.15 * int(np.flatnonzero(lines[exact] >= least).max(initial=0))
            for name, values in lines.items():
                for panel in axes[:, column]:
                    _draw_weight(panel, values, name == exact, names.index(name))
            axes[0, column].set_title(title)
            axes[1, column].set_yscale("log")
            axes[1, column].set_xlim(-0.4, end + 0.4)
            axes[1, column].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[1, 0].set_ylim(least, 2)
        axes[0, 0].set_ylabel("normalised weight")
        axes[1, 0].set_ylabel("the same, logarithmic")
        axes[1, len(drawn) // 2].set_xlabel(DISTANCE)
        exact_names = {next(iter(lines)) for lines in drawn.values()}
        handles = [
            Line2D([], [], label=name, **_weight_style(name in exact_names, number))
            for number, name in enumerate(names)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns(names))
        return figure


def _draw_weight(axes: Any, values: Floats, exact: bool, number: int) -> None:
    shown = np.where(values > 0, values, np.nan)
    axes.plot(np.arange(len(values)), shown, zorder=3 if exact else 2, **_weight_style(exact, number))


def _weight_style(exact: bool, number: int) -> dict[str, Any]:
    if exact:
        return {"color": "black", "marker": "o", "linestyle": "none"}
    return {"color": LINES[(number - 1) % len(LINES)], "linestyle": ("-", *DASHES)[(number - 1) % 4]}


def beta_radius_figure(
    radii: ArrayLike,
    betas: Mapping[str, ArrayLike],
    fractions: ArrayLike,
    marks: Mapping[str, int] | None = None,
) -> Figure:
    """Fitted beta against the Hamming radius d; above, the share p of the space that a circle of it holds.

    radii: (K,), rising. betas: one line a name, (K,). fractions: p, (K,). marks: radii by name, of the optima; each has
    a dotted line with its name. Raises ValueError for arrays of another shape.
    """
    radius = row_of("radii", radii)
    lines = {
        name: row_of(f"betas[{name!r}]", values, len(radius)) for name, values in not_empty(betas).items()
    }
    shares = row_of("fractions", fractions, len(radius))
    with style():
        figure = Figure(figsize=(0.75 * WIDTH, 3.9), layout="constrained")
        axes = figure.subplots()
        for number, (name, values) in enumerate(lines.items()):
            axes.plot(
                radius,
                values,
                color=LINES[number % len(LINES)],
                linestyle=("-", *DASHES)[number % 4],
                marker=MARKERS[number % len(MARKERS)],
                markersize=2.6,
                markevery=max(1, -(-len(radius) // MARKS)),
                label=name,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("Hamming radius $d$")
        axes.set_ylabel(r"inverse temperature $\beta$")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlim(radius[0] - 0.5, radius[-1] + 0.5)
        for name, mark in (marks or {}).items():
            axes.axvline(mark, color=REFERENCE_GREY, lw=0.8, ls=":")
            axes.text(
                mark, 0.02, name, rotation=90, ha="right", va="bottom", color="#444444", fontsize=8,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        above = axes.secondary_xaxis("top")
        ticks = [tick for tick in MaxNLocator(6, integer=True).tick_values(radius[0], radius[-1])]
        places = [int(np.abs(radius - tick).argmin()) for tick in ticks if radius[0] <= tick <= radius[-1]]
        above.set_xticks(radius[places], [_scientific(shares[place]) for place in places])
        above.set_xlabel("share $p$ of the space within the radius")
        figure.legend(loc="outside lower center", ncols=legend_columns(list(lines)))
        return figure


def critical_distance_figure(distances: Mapping[int, ArrayLike], critical: Mapping[int, int]) -> Figure:
    """Distance to the pattern after one read against that before, one line a radius, with the line of no change.

    distances: (n+1,) over the distance before, by radius. critical: the critical distance by radius, where a filled
    marker stands; 0 or a radius that is missing has none. Raises ValueError for arrays of another shape.
    """
    lines = {
        radius: row_of(f"distances[{radius}]", values) for radius, values in not_empty(distances).items()
    }
    with style():
        figure = Figure(figsize=(0.62 * WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        half = max(len(values) - 1 for values in lines.values()) // 2 + 2
        axes.plot([0, half], [0, half], color=REFERENCE_GREY, lw=0.9, label="no change")
        for number, (radius, values) in enumerate(lines.items()):
            colour = LINES[number % len(LINES)]
            axes.plot(
                np.arange(len(values)),
                values,
                color=colour,
                linestyle=("-", *DASHES)[number % 4],
                label=f"$d$ = {radius}",
            )
            place = critical.get(radius, 0)
            if place:
                mark = MARKERS[number % len(MARKERS)]
                axes.plot(place, values[place], mark, color=colour, markersize=6, clip_on=False, zorder=5)
        axes.set_xlim(0, half)
        axes.set_ylim(-0.01 * half, half)
        axes.set_xlabel("Hamming distance before the read")
        axes.set_ylabel("expected distance after it")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.legend(loc="outside lower center", ncols=4)
        return figure


def row_of(name: str, values: ArrayLike, length: int | None = None) -> Floats:
    """A row of numbers as float64, of this length where one is given."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or (length is not None and len(array) != length):
        expected = "(K,)" if length is None else f"({length},)"
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    return array


def not_empty(given: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The mapping, unless it has no entry."""
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"a mapping with at least one entry is needed, got {given!r}")
    return given


def _marker(number: int, label: str) -> Line2D:
    return Line2D(
        [],
        [],
        color=LINES[number % len(LINES)],
        marker=MARKERS[number % len(MARKERS)],
        ls="none",
        label=label,
    )


def _dashes(dashes: str, label: str) -> Line2D:
    return Line2D([], [], color="black", ls=dashes, lw=1.0, label=label)


def _two_lines(figure: Figure, first: list[Line2D], second: list[Line2D]) -> None:
    """A legend of two lines; legends fill column by column."""
    columns = max(len(first), len(second))
    blank = Line2D([], [], linestyle="none", label=" ")
    padded = [part + [blank] * (columns - len(part)) for part in (first, second)]
    handles = [handle for pair in zip(*padded, strict=True) for handle in pair] if second else first
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def legend_columns(names: Sequence[str]) -> int:
    """How many entries of a legend fit side by side."""
    return max(1, min(len(names), LEGEND // (max(map(len, names)) + 8)))


def _scientific(share: float) -> str:
    """As a tick: .3 or 2e-5 with the power written out."""
    if share >= 0.01:
        return f"{share:.2g}"
    digit, power = f"{share:.0e}".split("e")
    return f"${digit}\\cdot 10^{{{int(power)}}}$"
