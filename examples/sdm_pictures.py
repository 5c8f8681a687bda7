"""Attention as Sparse Distributed Memory: the pictures of docs/sparse-distributed-memory.md.

python examples/sdm_pictures.py [FOLDER]: writes them as PNG and SVG into FOLDER, results/sdm by default.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from hopdeq_lwpf import plots
from hopdeq_lwpf.data import load_digits
from hopdeq_lwpf.models import sdm

N, NEURONS, PATTERNS = 64, 2**64, 1024  # the published transformer setting
OPTIMA = {"memory": 5, "signal to noise": 11, "critical distance": 15}
console = Console(width=120)


def intersections() -> Figure:
    shares = {d: sdm.log_circle_intersection(N, d) for d in OPTIMA.values()}
    fits = {d: sdm.fit_beta(N, d) for d in shares}
    bounds = sdm.exponential_bounds(N, 11, form="term")
    lines = {d: (fit.beta, fit.bias) for d, fit in fits.items()}
    return plots.intersection_figure(shares, lines, {11: (bounds.lower, bounds.upper)})


def weights() -> Figure:
    cosine = 1 - 2 * torch.arange(N + 1, dtype=torch.float64) / N
    panels = {}
    for d in OPTIMA.values():
        fits = {
            "line, least squares": sdm.fit_beta(N, d),
            "line, as published": sdm.fit_beta(N, d, estimator="published"),
            "softmax": sdm.fit_beta(N, d, fit="softmax"),
        }
        panels[f"$d$ = {d}"] = {
            "circle intersection": sdm.log_circle_intersection(N, d).softmax(0),
            **{name: (fit.beta * cosine).softmax(0) for name, fit in fits.items()},
        }
    return plots.weights_figure(panels)


def betas() -> Figure:
    radii = torch.arange(3, 29)
    estimates = {
        "least squares": {"estimator": "ols"},
        "as published": {"estimator": "published"},
        "caps, least squares": {"space": "continuous"},
    }
    lines = {name: [sdm.fit_beta(N, int(d), **how).beta for d in radii] for name, how in estimates.items()}
    return plots.beta_radius_figure(radii, lines, sdm.space_fraction(N, radii), OPTIMA)


def critical_distances() -> Figure:
    radii = (9, 11, 15, 19, 22)
    setting = {"neurons": NEURONS, "patterns": PATTERNS}
    after = {d: sdm.read_statistics(N, d, **setting).distance for d in radii}
    return plots.critical_distance_figure(
        after, {d: int(sdm.critical_distance(N, d, **setting)) for d in radii}
    )


def recall() -> Figure:
    names = ("Binary_SDM", "Binary_SDM_BFit_Attention", "Cont_SDM", "Cont_SDM_BFit_Attention")
    settings = sdm.GridSettings(
        radii=(5, 11, 19), flips=(0, 4, 8, 12, 16, 20, 24), algorithms=names, patterns=512, data_sets=3
    )
    rows = [
        {"algorithm": row.algorithm, "radius": row.radius, "flips": row.flips, "cosine": row.mean_cosine}
        for row in sdm.run_grid(settings)
    ]
    return plots.recall_noise_figure(rows)


class Reader(nn.Module):
    """Digits as 16 patches; two layers with two heads of width 64."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.place = nn.Parameter(0.1 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 2, 128, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = pictures.unflatten(-1, (4, 2, 4, 2)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        return self.head(self.encoder(self.embed(patches) + self.place).mean(1))


def effective_betas() -> Figure:
    pictures, labels = load_digits()
    torch.manual_seed(0)
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    kept = {}
    for epoch in range(11):
        if epoch in (0, 10):
            heads = sdm.effective_betas(model.eval(), pictures[1400:])
            kept["before training" if not epoch else "after 10 epochs"] = torch.cat([h.betas for h in heads])
            for head in heads:
                console.print(
                    f"epoch {epoch}, {head.layer}, head {head.head}: beta {head.median:.2f} "
                    f"({head.quantile(0.05):.2f} to {head.quantile(0.95):.2f}), radius {head.radius}, "
                    f"R2 {head.r2:.2f}"
                )
        for rows in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(pictures[rows]), labels[rows]).backward()
            optimizer.step()
    optima = {name: sdm.fit_beta(N, d).beta for name, d in OPTIMA.items()}
    return plots.effective_beta_figure(kept, {f"{name}, {beta:.1f}": beta for name, beta in optima.items()})


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/sdm")
folder.mkdir(parents=True, exist_ok=True)
pictures = {
    "sdm-intersections": intersections,
    "sdm-weights": weights,
    "sdm-betas": betas,
    "sdm-critical-distances": critical_distances,
    "sdm-recall": recall,
    "sdm-effective-betas": effective_betas,
}
for name, draw in pictures.items():
    png, svg = plots.save_figure(draw(), folder, name)
    console.print(f"{png} and {svg}")
