"""Pictures from tables and arrays; nothing here runs a solve.

Every function returns a `matplotlib.figure.Figure` that is bound to no window and no global state;
`save_figure` writes it as PNG and SVG. Of recall and energy colour tells the forgetting unit, line and marker the
steps; convergence has one panel or line a name; of Sparse Distributed Memory colour tells the radius or the algorithm.
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
from hopdeq_lwpf.plots.convergence import not_converged_figure, residual_heatmap
from hopdeq_lwpf.plots.diffusion import curve_figure, error_figure
from hopdeq_lwpf.plots.recall import (
    beta_figure,
    energy_figure,
    picture_grid,
    recall_figure,
    steps_figure,
    steps_name,
)
from hopdeq_lwpf.plots.sdm import (
    beta_radius_figure,
    critical_distance_figure,
    intersection_figure,
    weights_figure,
)
from hopdeq_lwpf.plots.sdm_recall import effective_beta_figure, recall_noise_figure

__all__ = [
    "KIND_NAMES",
    "REFERENCE_GREY",
    "UNIT_NAMES",
    "WIDTH",
    "beta_figure",
    "beta_radius_figure",
    "critical_distance_figure",
    "curve_figure",
    "effective_beta_figure",
    "energy_figure",
    "error_figure",
    "intersection_figure",
    "not_converged_figure",
    "picture_grid",
    "recall_figure",
    "recall_noise_figure",
    "residual_heatmap",
    "save_figure",
    "steps_figure",
    "steps_name",
    "style",
    "unit_colour",
    "weights_figure",
]
