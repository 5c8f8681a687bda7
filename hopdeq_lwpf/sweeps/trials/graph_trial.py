"""One trial of retrieval on graphs, and everything it found in one record. Runs in a worker process."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hopdeq_lwpf import Termination
from hopdeq_lwpf.data import make_curve
from hopdeq_lwpf.graphs import KNN
from hopdeq_lwpf.models.diffusion import retrieve_on_graph
from hopdeq_lwpf.sweeps.trials.graph_spec import GraphSpec
from hopdeq_lwpf.sweeps.trials.measured import measured


def run_trial(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the settings (`GraphSpec.as_dict()`); returns the part of the record that is found out.

    Leaves no files. What goes wrong is returned under "failure".
    """
    return measured(lambda: measure(GraphSpec(**settings)))


def measure(spec: GraphSpec) -> dict[str, float]:
    """What the trial measures, by name (`graph_spec.MEASURES`)."""
    points = make_curve(
        spec.curve,
        stored=spec.stored,
        queries=spec.queries,
        stored_noise=spec.stored_noise,
        query_noise=spec.query_noise,
        seed=spec.seed,
    )
    started = time.perf_counter()
    found = retrieve_on_graph(
        points.query,
        points.stored,
        beta=spec.beta,
        lam=spec.lam,
        eta=spec.eta,
        logit_eta=spec.logit_eta,
        graph=KNN(neighbors=spec.neighbors),
        laplacian=spec.laplacian,
        forgetting=None if spec.forgetting == "none" else spec.forgetting,
        inject=spec.inject,
        steps=spec.steps,
        # Plain steps, so that what is counted as a rise of the energy is none that a solver took back.
        solver="picard",
        stop=Termination(max_steps=2000),
        trace=True,
    )
    seconds = time.perf_counter() - started
    size = points.target.square().sum(1).mean()
    return {
        "error": float((found.value - points.target).square().sum(1).mean() / size),
        "query_error": float((points.query - points.target).square().sum(1).mean() / size),
        "angle_error": float(
            _apart(points.stored_angle[found.index], points.query_angle)[found.index >= 0].mean()
        ),
        "steps": float(found.steps),
        "converged": float(found.converged),
        "energy_rises": _rises(found.trace.energy if found.trace is not None else None),
        "seconds": seconds,
    }


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """The shorter way round between angles."""
    apart = (first - second).abs() % (2 * math.pi)
    return torch.minimum(apart, 2 * math.pi - apart)


def _rises(energy: Tensor | None) -> float:
    """How often the energy rose by more than rounding; NaN where there is none."""
    if energy is None:
        return math.nan
    slack = 64 * torch.finfo(energy.dtype).eps * energy.abs()
    return float((energy.diff(dim=0) > slack[:-1]).sum())
