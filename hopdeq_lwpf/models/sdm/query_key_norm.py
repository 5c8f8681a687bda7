"""The betas of the optimal radii, and those that transformers with query-key normalisation learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf.models.sdm.betas import fit_beta
from hopdeq_lwpf.models.sdm.radii import OBJECTIVES, optimal_radius


@dataclass(frozen=True)
class BetaStatistics:
    """Of several betas; deviation: standard deviation, divided by their number."""

    count: int
    mean: float
    deviation: float
    median: float
    least: float
    largest: float


# Of the 90 scales that transformers with query-key normalisation (Henry et al. 2020) learnt, which Bricken and Pehlevan
# 2021 compare with their optima. Queries and keys have length 1 there, so that a scale is a beta as it stands.
QUERY_KEY_NORM = BetaStatistics(90, 15.647535555555558, 3.0796997871477703, 15.1115, 10.3109, 24.8478)
# How many of them lie below the beta of the radius of the best signal-to-noise ratio, n = 64, by estimator:
# 15.9, as printed, and 14.412.
QUERY_KEY_NORM_BELOW_SNR = {"published": 51, "ols": 33}


@dataclass(frozen=True)
class OptimalBetas:
    """The radii that are best for the three objectives of `optimal_radius`, and their fitted betas."""

    radii: dict[str, int]
    betas: dict[str, float]

    def contain(self, betas: BetaStatistics | Sequence[float] | Tensor) -> bool:
        """Whether all these betas lie between the smallest and the largest of the three."""
        given = betas if isinstance(betas, BetaStatistics) else beta_statistics(betas)
        return min(self.betas.values()) <= given.least and given.largest <= max(self.betas.values())

    def count_below(self, betas: Sequence[float] | Tensor) -> dict[str, int]:
        """How many of these betas lie below each of the three."""
        values = _values(betas)
        return {name: int((values < beta).sum()) for name, beta in self.betas.items()}


def optimal_betas(
    n: int = 64,
    *,
    neurons: float = 2.0**64,
    patterns: float = 1024,
    estimator: str = "ols",
    space: str = "binary",
    exact_moments: bool = False,
) -> OptimalBetas:
    """The betas of the Hamming radii that are best for signal-to-noise ratio, memory and critical distance.

    n, neurons, patterns: the defaults are the published transformer setting, a neuron at each address of the 64 bits
    of a head. estimator, space: as in `fit_beta`; estimator="published" gives 35.5, 15.9 and 10.1. exact_moments: as
    in `optimal_radius`. Of tied radii the smallest counts. Raises ValueError or TypeError as these two do.
    """
    radii = {}
    for name in OBJECTIVES:
        stored = None if name == "memory" else patterns
        best = optimal_radius(
            n, neurons=neurons, patterns=stored, objective=name, exact_moments=exact_moments
        )
        radii[name] = best.radius
    betas = {name: fit_beta(n, d, estimator=estimator, space=space).beta for name, d in radii.items()}
    return OptimalBetas(radii, betas)


def beta_statistics(betas: Sequence[float] | Tensor) -> BetaStatistics:
    """Count, mean, standard deviation, median (of an even number the mean of the middle two) and range of betas."""
    values = _values(betas)
    return BetaStatistics(
        len(values),
        float(values.mean()),
        float(values.std(correction=0)),
        float(values.quantile(0.5)),
        float(values.min()),
        float(values.max()),
    )


def _values(betas: Sequence[float] | Tensor) -> Tensor:
    values = torch.as_tensor(betas).detach().double().reshape(-1)
    if not len(values) or not bool(values.isfinite().all()):
        raise ValueError(f"betas must be finite numbers, at least one, got {betas!r}")
    return values
