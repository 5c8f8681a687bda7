"""How binary addresses and neurons lie around a point: shares of the space, radii, the nearest neuron.

n bits, {0,1}^n; the Hamming distance of a point to a random address is Binomial(n, 1/2), whose distribution
function at d is the share p of the space within the radius d (Kanerva 1988, ch. 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.models.sdm.counting import (
    check_fraction,
    check_positive,
    check_radii,
    check_whole,
    log1mexp,
    log_binomial,
)

METHODS = ("exact", "normal")


def log_space_fraction(n: int, d: int | Sequence[int] | Tensor) -> Tensor:
    """ln of the share of {0,1}^n within the Hamming distance d of a point: shape of d, float64.

    n: bits, >= 1. d: radius or radii, whole, 0..n. Exact to rounding also far in both tails, where the share
    itself underflows or rounds to 1. Raises ValueError or TypeError for other n and d.
    """
    n = check_whole("n", n)
    return _log_fractions(n)[check_radii(n, d)]


def space_fraction(n: int, d: int | Sequence[int] | Tensor) -> Tensor:
    """Share p of {0,1}^n within the Hamming distance d of a point: shape of d; see `log_space_fraction`."""
    return log_space_fraction(n, d).exp()


def radius_for_fraction(n: int, p: float) -> int:
    """The smallest Hamming radius that holds at least the share p of {0,1}^n: the binomial quantile.

    p: strictly between 0 and 1. It undoes `space_fraction`: the comparison allows for the rounding of p.
    Raises ValueError or TypeError for other n and p.
    """
    n, p = check_whole("n", n), check_fraction("p", p)
    log_cdf = _log_fractions(n)
    if p <= 0.5:
        # ln p is known to a few ulps of its own size and no better.
        reached = log_cdf >= math.log(p) - 1e-14 * (n + abs(math.log(p)))
    else:  # by the upper tail, which keeps its digits where p is next to 1
        outside = torch.cat([log_cdf[:-1].flip(0), log_cdf.new_tensor([-math.inf])]).exp()
        reached = outside <= (1 - p) + 4e-16
    return int(reached.int().argmax())


def neuron_within(
    n: int, d: int | Sequence[int] | Tensor, neurons: float, *, method: str = "exact"
) -> Tensor:
    """P(at least one of `neurons` random neurons within the Hamming distance d): shape of d, float64.

    1 - (1 - F(d))^r. neurons: r, above 0. n, d: as in `log_space_fraction`.
    method: "exact", F binomial; "normal", the published 1 - exp(-r Phi((d - n/2) / sqrt(n/4))), 0.4 to
    9.5 % low at n = 1000, r = 1e6, d = 430 to 420. Raises ValueError or TypeError for other n, d, neurons and method.
    """
    n = check_whole("n", n)
    radii = check_radii(n, d)
    check_positive("neurons", neurons)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if method == "normal":
        missed = -torch.special.log_ndtr((radii.double() - n / 2) / math.sqrt(n / 4)).exp()
    else:
        missed = log1mexp(_log_fractions(n).clamp(max=0.0))[radii]
    return -torch.expm1(float(neurons) * missed)


def nearest_neuron_radius(n: int, neurons: float, *, method: str = "exact") -> float:
    """The Hamming radius within which one of `neurons` random neurons is expected: F(d) = 1/r.

    neurons: r, above 1. method: "exact", the smallest whole radius that holds at least one on average;
    "normal", the root of the normal approximation, not whole. Raises ValueError or TypeError for other
    arguments.
    """
    n = check_whole("n", n)
    check_positive("neurons", neurons, least=1.0)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if method == "exact":
        return float(radius_for_fraction(n, 1 / neurons))
    share = torch.tensor(1 / neurons, dtype=torch.float64)
    return n / 2 + math.sqrt(n / 4) * float(torch.special.ndtri(share))


def _log_fractions(n: int) -> Tensor:
    """ln P(Bin(n, 1/2) <= d) for d = 0..n: (n+1,)."""
    below = torch.logcumsumexp(log_binomial(n), 0)
    distance = torch.arange(n + 1)
    lower = 2 * distance < n
    # The upper half by the other tail: P(<= d) = 1 - P(<= n - d - 1).
    tail = torch.cat([below[:-1].flip(0), below.new_tensor([-math.inf])])
    return torch.where(lower, below, log1mexp(torch.where(lower, -1.0, tail)))
