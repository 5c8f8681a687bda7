"""States that diffuse over a graph: the pictures of docs/graph-diffusion.md.

python examples/diffusion_pictures.py [FOLDER [RESULTS]]: writes them as PNG and SVG into FOLDER, results/diffusion by
default; with RESULTS, the results.csv of `hopdeq-lwpf sweep diffusion_manifold`, its errors too.
"""

import csv
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from hopdeq_lwpf import plots
from hopdeq_lwpf.data import make_curve
from hopdeq_lwpf.graphs import KNN, heat_kernel
from hopdeq_lwpf.models.diffusion import retrieve_on_graph

NOISE, BETA, ETA, LAM = 1.0, 8.0, 0.3, 0.3
graph = KNN(neighbors=5)
console = Console(width=120)


def curve_of(name: str) -> Tensor:
    """The curve itself, without noise, at 360 angles in turn."""
    return make_curve(name, queries=2000, seed=2).target


def stages(name: str = "fourier") -> Figure:
    """Queries before and after one step and at the equilibrium, without and with diffusion; the stored patterns too."""
    points = make_curve(name, stored_noise=NOISE, query_noise=NOISE, seed=2)
    near = graph(points.stored)
    laplacian = near.laplacian("combinatorial")
    panels = {
        "stored patterns and their graph": (points.stored, near.to_sparse().edge),
        "... diffused, eta = 0.3": (heat_kernel(laplacian, ETA)(points.stored), None),
        "queries": (points.query, None),
    }
    for title, options in {
        "one step, no diffusion": {"steps": 1, "lam": 0.0},
        "one step, eta = lam = 0.3": {"steps": 1, "eta": ETA, "lam": LAM},
        "equilibrium, eta = lam = 0.3": {"steps": None, "eta": ETA, "lam": LAM, "inject": "input"},
    }.items():
        found = retrieve_on_graph(
            points.query, points.stored, beta=BETA, graph=graph, laplacian="combinatorial", **options
        )
        panels[title] = (found.value, None)
        error = float((found.value - points.target).square().sum(1).mean())
        console.print(f"{title}: mean square error {error:.3f} of a curve of mean square length 1")
    return plots.curve_figure(panels, curve_of(name))


def turned_digit() -> Figure:
    """A turning digit: the curve itself, noisy queries, and what is recalled after one step."""
    points = make_curve("rotated_digit", stored_noise=NOISE, query_noise=NOISE, seed=1)
    recalled = {
        title: retrieve_on_graph(
            points.query, points.stored, beta=BETA, graph=graph, laplacian="combinatorial", steps=1, **options
        ).value
        for title, options in {"plain": {"lam": 0.0}, "diffusion": {"eta": ETA, "lam": LAM}}.items()
    }
    chosen = torch.linspace(0, len(points.query) - 1, 9).round().long()
    side = math.isqrt(points.query.shape[1])
    rows = {"the curve": points.target, "query": points.query, **recalled}
    lines = [(name, part[chosen].reshape(-1, side, side).double().numpy()) for name, part in rows.items()]
    titles = [f"{math.degrees(angle):.0f}°" for angle in points.query_angle[chosen].tolist()]
    return plots.picture_grid(lines, titles, (-0.3, 0.5))


def errors(results: str, noise: str = "1.0") -> Figure:
    """Errors of the sweep at one strength of noise, against beta."""
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    with open(results, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["noise"] == noise:
                lines = panels.setdefault(f"{row['curve'].replace('_', ' ')}\n{row['recall']}", {})
                points = lines.setdefault(row["diffusion"], {})
                points.setdefault(float(row["beta"]), []).append(float(row["error"]))
    return plots.error_figure(panels, label="mean square error")


def main(folder: str = "results/diffusion", results: str | None = None) -> None:
    """Write the pictures, and say what is in them."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    figures = {"diffusion-states": stages(), "diffusion-digits": turned_digit()}
    if results is not None:
        figures["diffusion-errors"] = errors(results)
    for name, figure in figures.items():
        console.print(f"written: {plots.save_figure(figure, out, name)[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
