"""Sparse Distributed Memory: the published recall table, and the read of explicit neurons."""

from __future__ import annotations

import time

import torch

from benchmarks.memory import Peak
from hopdeq_lwpf.models.sdm.experiments import TABLE, GridSettings, run_grid
from hopdeq_lwpf.models.sdm.memory import SDM
from hopdeq_lwpf.models.sdm.neuron_memory import NeuronMemory
from hopdeq_lwpf.models.sdm.neurons import Neurons

# 40 settings of (n, radius, noise) x 9 algorithms x 1,024 queries.
GRIDS = (
    GridSettings(),
    GridSettings(n=1000, radii=(411, 431, 447, 480), flips=(0, 125, 250, 375), neurons=1e6),
)
ROUNDS = 3


def _neurons(d: int) -> list[dict[str, object]]:
    """1e5 neurons, n = 64, 1,024 patterns, 256 queries: storing and reading, and reading alone."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2, (1024, 64), generator=generator).float()
    query = patterns[:256]
    neurons = Neurons.random(100_000, 64, d)
    rows: list[dict[str, object]] = []
    written = NeuronMemory(neurons, steps=1)
    written.write(patterns)
    calls = {
        "store and read": lambda: SDM(neurons, steps=1).f(query, SDM(neurons).f.prepare(query, patterns)),
        "read": lambda: written(query),
    }
    for name, call in calls.items():
        with Peak() as peak:  # of the first call, since what it frees may stay with the process
            call()
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        rows.append(
            {
                "part": f"explicit neurons, d={d}: {name}",
                "seconds": sorted(times)[ROUNDS // 2],
                "MB": peak.above,
            }
        )
    return rows


@torch.no_grad()
def run() -> list[dict[str, object]]:
    """One row a measurement: the neurons, and each part of the grid."""
    rows = _neurons(15) + _neurons(27)
    total = 0.0
    for grid in GRIDS:
        start = time.perf_counter()
        found = run_grid(grid)
        seconds = time.perf_counter() - start
        total += seconds
        rows.append(
            {
                "part": f"grid, n={grid.n}",
                "seconds": seconds,
                "memories": len(found),
                "unconverged": sum(int((~row.converged).sum()) for row in found),
                "cycles": sum(int((row.cycle > 1).sum()) for row in found),
            }
        )
        for name in TABLE:
            part = [row.mean_cosine for row in found if row.algorithm == name]
            rows.append({"part": f"n={grid.n}: {name}", "mean cosine": sum(part) / len(part)})
    rows.append({"part": "grid: 40 settings, 9 algorithms, 1,024 queries", "seconds": total})
    return rows
