"""Separation functions that do not normalise: rectified polynomial, and the Epanechnikov kernel's log-sum-ReLU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hopdeq_lwpf.separation.base import Separation


class Polynomial(Separation):
    """L = sum relu(s)^n / n, p = relu(s)^(n-1): dense associative memory, Krotov & Hopfield 2016.

    Rectified, so that L is convex and non-decreasing whatever n is; forgetting needs both. The weights do not
    sum to 1 and grow with the scores: without a normalised read-out the iteration may diverge, while its
    energy falls without bound.

    degree: n >= 2, so that p is Lipschitz on bounded scores; 2 is the classical Hopfield network. Since negative
        scores are cut off, n need not be an integer. Raises ValueError below 2, TypeError for no number.
    """

    has_energy = True

    def __init__(self, degree: float = 2) -> None:
        self.degree = _real("degree", degree)
        if self.degree < 2:
            raise ValueError(f"degree must be >= 2, got {degree!r}; for a milder separation use 'softmax'")

    def weights_of(self, logits: Tensor) -> Tensor:
        """relu(s)^(n-1)."""
        return logits.relu().pow(self.degree - 1)

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """The sum of relu(s)^n / n."""
        return logits.relu().pow(self.degree).sum(-1) / self.degree

    def __repr__(self) -> str:
        return f"Polynomial(degree={self.degree!r})"


class LSR(Separation):
    """L = log(eps + sum relu(1 + s)), p = dL/ds: log-sum-ReLU, Hoover et al. 2025 (arXiv 2506.10801).

    Meant for s = -(beta/2)|z - xi|^2: the sum is then an Epanechnikov density, a pattern is active within
    sqrt(2/beta), and a stationary point is the mean of its active patterns.

    L is not convex, but exp(L) is, and non-decreasing. Its tangent, a lower bound, is a concave quadratic in z
    with the top at X^T p / sum p, so that this step never lowers exp(L), hence never raises E = -L/beta: that
    is what `has_energy` promises. It holds with forgetting too, D being convex and non-decreasing.

    eps: >= 0, a floor under the density. Where no pattern is active the weights and all gradients are 0 and
        L = log(eps): -inf with eps = 0, the energy +inf there. It is the default since the density then has
        the compact support that makes recall exact. Raises ValueError below 0, TypeError for no number.
    """

    has_energy = True
    similarity = "euclidean"

    def __init__(self, eps: float = 0.0) -> None:
        self.eps = _real("eps", eps)
        if self.eps < 0:
            raise ValueError(f"eps must be >= 0, got {eps!r}; 0 gives the energy no floor")

    def weights_of(self, logits: Tensor) -> Tensor:
        """1 / (eps + sum relu(1 + s)) where 1 + s > 0, else 0."""
        active, total, _ = self._density(logits)
        return active.detach().sign() / total.unsqueeze(-1)

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """log(eps + sum relu(1 + s))."""
        _, total, empty = self._density(logits)
        return total.log().masked_fill(empty, -math.inf)

    def both_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one sum."""
        active, total, empty = self._density(logits)
        weights = active.detach().sign() / total.unsqueeze(-1)
        return weights, total.log().masked_fill(empty, -math.inf)

    def _density(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """relu(1 + s); eps and its sum, but 1 where that is 0, so that no gradient is NaN; where it is 0."""
        active = (logits + 1).relu()
        total = active.sum(-1) + self.eps
        empty = total.detach() == 0
        return active, total + empty, empty

    def __repr__(self) -> str:
        return f"LSR(eps={self.eps!r})"


def _real(name: str, value: float) -> float:
    """The number, or an error that names it."""
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return value
