"""Pictures from tables and arrays; nothing here runs a solve.

Every function returns a `matplotlib.figure.Figure` that is bound to no window and no global state;
`save_figure` writes it as PNG and SVG. Colour tells the forgetting unit, line and marker the steps.
"""

from hopdeq_lwpf.plots.common import (
    KIND_NAMES,
    REFERENCE_GREY,
    UNIT_NAMES,
    WIDTH,
    save_figure,
    style,
    unit_colour,
)
from hopdeq_lwpf.plots.recall import (
    beta_figure,
    energy_figure,
    picture_grid,
    recall_figure,
    steps_figure,
    steps_name,
)

__all__ = [
    "KIND_NAMES",
    "REFERENCE_GREY",
    "UNIT_NAMES",
    "WIDTH",
    "beta_figure",
    "energy_figure",
    "picture_grid",
    "recall_figure",
    "save_figure",
    "steps_figure",
    "steps_name",
    "style",
    "unit_colour",
]
