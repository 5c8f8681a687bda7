"""One trial of Sparse Distributed Memory, and everything it found in one record. Runs in a worker process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hopdeq_lwpf.models import sdm
from hopdeq_lwpf.models.sdm.experiments import GridSettings, run_grid
from hopdeq_lwpf.sweeps.trials.measured import measured
from hopdeq_lwpf.sweeps.trials.sdm_spec import SdmSpec


def run_trial(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the settings (`SdmSpec.as_dict()`); returns the part of the record that is found out.

    Leaves no files. What goes wrong is returned under "failure".
    """

    def measure() -> dict[str, float]:
        spec = SdmSpec(**settings)
        return {"recall": _recall, "fit": _fit, "critical_distance": _distance}[spec.experiment](spec)

    return measured(measure)


def _recall(spec: SdmSpec) -> dict[str, float]:
    """Means over the queries, of which there are patterns times repeats."""
    options = {
        name: getattr(spec, name) for name in ("n", "patterns", "repeats", "neurons", "explicit_neurons")
    }
    settings = GridSettings(
        **options,
        radii=(spec.radius,),
        flips=(spec.flips,),
        algorithms=(spec.algorithm,),
        estimator=spec.estimator,
        max_steps=spec.max_steps,
        seed=spec.seed,
    )
    (row,) = run_grid(settings)
    return {
        "cosine": row.mean_cosine,
        "recalled": row.recalled,
        "steps": float(row.steps.double().mean()),
        "converged": float(row.converged.double().mean()),
        "cycling": float((row.cycle > 1).double().mean()),
        "empty": float(row.empty.double().mean()),
    }


def _fit(spec: SdmSpec) -> dict[str, float]:
    """The fitted beta; weight_error is the largest difference of normalised weights over all distances."""
    fit = sdm.fit_beta(spec.n, spec.radius, space=spec.space, estimator=spec.estimator, fit=spec.fit)
    distance = torch.arange(spec.n + 1, dtype=torch.float64)
    cosine = 1 - 2 * distance / spec.n
    exact = (
        sdm.log_circle_intersection(spec.n, spec.radius)
        if spec.space == "binary"
        else sdm.log_cap_intersection(spec.n, spec.radius, cosine)
    )
    error = (torch.softmax(exact, 0) - torch.softmax(fit.beta * cosine, 0)).abs().max()
    return {"beta": fit.beta, "bias": fit.bias, "r2": fit.r2, "weight_error": float(error)}


def _distance(spec: SdmSpec) -> dict[str, float]:
    found = sdm.critical_distance(spec.n, spec.radius, neurons=spec.neurons, patterns=spec.patterns)
    fraction = sdm.log_space_fraction(spec.n, spec.radius) / math.log(10)
    return {"critical_distance": float(found), "log10_fraction": float(fraction)}
