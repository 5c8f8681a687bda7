"""The inverse temperature at which softmax attention comes nearest to a Sparse Distributed Memory.

The circle intersection falls almost exponentially with the Hamming distance, so that exp(beta cosine + bias)
fits it (Bricken and Pehlevan 2021, sec. 2.1); beta is the slope of the log intersection over the cosine
1 - 2 dv / n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.models.sdm.caps import log_cap_intersection
from hopdeq_lwpf.models.sdm.counting import check_radii, check_whole
from hopdeq_lwpf.models.sdm.intersections import log_circle_intersection

SPACES = ("binary", "continuous")
ESTIMATORS = ("ols", "published")
FITS = ("log", "softmax")


@dataclass(frozen=True)
class BetaFit:
    """intersection ~ exp(beta cosine + bias), as a share of the space; r2: 1 - residual / total squares.

    r2 is that of the log intersection for fit="log", of the normalised weights for fit="softmax".
    """

    beta: float
    bias: float
    r2: float


def fit_beta(
    n: int,
    d: int,
    *,
    space: str = "binary",
    estimator: str = "ols",
    fit: str = "log",
    distances: Sequence[int] | Tensor | None = None,
) -> BetaFit:
    """Fit beta to the circle intersection of n bits and the Hamming radius d.

    space: "binary", {0,1}^n; "continuous", caps of the sphere S^(n-1) at the same cosines (n >= 2).
    fit: "log", a line through the log intersection; "softmax", the beta whose softmax over the distances has
    the least squared error to the normalised intersections.
    estimator, of the line: "ols", least squares; "published", the authors' code, whose slope is larger by
    k / (k - 1) for k distances, since it divides a covariance over k - 1 by a variance over k: 10 % at d = 11.
    distances: the Hamming distances dv of the fit, whole, 0..n, at least two different ones. Default: 0..d-1
    for "log", as published, cut at the radius because the line bends beyond; 0..n for "softmax".
    range(1, d + 1) is that of the paper's figure of beta against d.
    Raises ValueError or TypeError for other arguments, and where a distance has no intersection at all, the
    log of which has no line.
    """
    n = check_whole("n", n, 2 if space == "continuous" else 1)
    d = check_whole("d", d, 0, n)
    for name, value, allowed in (
        ("space", space, SPACES),
        ("estimator", estimator, ESTIMATORS),
        ("fit", fit, FITS),
    ):
        if value not in allowed:
            raise unknown(name, value, allowed)
    if fit == "softmax" and estimator != "ols":
        raise ValueError(f'estimator {estimator!r} is one of fit="log"; leave it out with fit="softmax"')
    if distances is None:
        distances = range(d if fit == "log" else n + 1)
    apart = check_radii(n, distances, "distances").reshape(-1)
    if apart.unique().numel() < 2:
        raise ValueError(
            f"distances must hold at least two different ones, got {apart.tolist()} at d = {d}; the default "
            "0..d-1 needs d >= 2"
        )
    cosine = 1 - 2 * apart.double() / n
    table = log_circle_intersection(n, d)[apart] if space == "binary" else log_cap_intersection(n, d, cosine)
    return _line(cosine, table, estimator, d) if fit == "log" else _softmax(cosine, table, d)


def _line(cosine: Tensor, log_share: Tensor, estimator: str, d: int) -> BetaFit:
    if not bool((log_share > -math.inf).all()):
        raise ValueError(
            f'fit="log" needs an intersection at every distance, but some lie beyond the reach 2 d = {2 * d}; '
            'leave them out of distances, or use fit="softmax"'
        )
    x, y = cosine - cosine.mean(), log_share - log_share.mean()
    beta = float((x * y).sum() / x.square().sum())
    if estimator == "published":
        beta *= cosine.numel() / (cosine.numel() - 1)
    return BetaFit(beta, float(log_share.mean() - beta * cosine.mean()), _r2(y - beta * x, y))


def _softmax(cosine: Tensor, log_share: Tensor, d: int) -> BetaFit:
    if int((log_share > -math.inf).sum()) < 2:
        raise ValueError(
            f'fit="softmax" needs an intersection at two distances at least, d = {d} leaves one: no finite beta '
            "fits; use a larger d"
        )
    weight = torch.softmax(log_share, 0)

    def slope(beta: float) -> float:
        """Half the derivative of the squared error."""
        fitted = torch.softmax(beta * cosine, 0)
        return float(((fitted - weight) * fitted * (cosine - (fitted * cosine).sum())).sum())

    beta = _rising_root(slope)
    fitted = torch.softmax(beta * cosine, 0)
    bias = float(torch.logsumexp(log_share, 0) - torch.logsumexp(beta * cosine, 0))
    return BetaFit(beta, bias, _r2(fitted - weight, weight - weight.mean()))


def _rising_root(slope: Callable[[float], float]) -> float:
    """Where the slope turns from falling to rising, from 0 on: doubling, then halving to the last digit."""
    if slope(0.0) >= 0:
        return 0.0
    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high


def _r2(residual: Tensor, centred: Tensor) -> float:
    """1 where there is nothing to explain and nothing is left."""
    total, left = float(centred.square().sum()), float(residual.square().sum())
    return 1 - left / total if total else 1.0
