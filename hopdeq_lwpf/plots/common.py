"""What all pictures share: style, colours, names, files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Okabe and Ito's palette, which stays distinct for the colour-blind and in grey.
COLOURS = {"none": "#0072B2", "relu": "#D55E00", "pfu": "#009E73", "topk": "#CC79A7"}
SPARE_COLOURS = ("#E69F00", "#56B4E9", "#F0E442")
UNIT_NAMES = {"none": "no forgetting", "relu": "ReLU", "pfu": "PFU", "topk": "top-k"}
DASHES: tuple[Any, ...] = (":", "--", "-.")  # of k steps, in order; converged is solid
MARKERS = ("o", "s", "^", "D")
KIND_NAMES = {
    "mask": ("masking", "share of the entries masked"),
    "occlude": ("occlusion", "share of the entries hidden"),
    "noise": ("Gaussian noise", "standard deviation / data range"),
    "flip": ("flips", "share of the entries flipped"),
    "given": ("given queries", ""),
}
WIDTH = 7.0  # inches: the text width of a page
REFERENCE_GREY = "#777777"


def style() -> AbstractContextManager[None]:
    """Readable at the width of a page; the hash salt makes equal figures equal files."""
    settings: Any = {
        "font.size": 9,
        "axes.labelsize": 9,
        "axes.titlesize": 9,
        "legend.fontsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "#e3e3e3",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.3,
        "lines.markersize": 3.6,
        "legend.frameon": False,
        "savefig.dpi": 200,
        "svg.hashsalt": "hopdeq-lwpf",
    }
    return mpl.rc_context(settings)


def save_figure(figure: Figure, folder: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    """Write NAME.png and NAME.svg into `folder`; the same figure gives the same bytes."""
    png, svg = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    with style():
        FigureCanvasAgg(figure)
        figure.savefig(png, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return png, svg


def unit_colour(unit: str, units: Sequence[str]) -> str:
    """The colour of a forgetting unit, the same in every picture; others get spare ones by their order."""
    others = [name for name in units if name not in COLOURS]
    return COLOURS[unit] if unit in COLOURS else SPARE_COLOURS[others.index(unit) % len(SPARE_COLOURS)]
