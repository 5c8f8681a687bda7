"""How many neurons two addresses activate in common: circles (Kanerva 1988), selected bits (Jaeckel 1989).

The intersection decides how much a stored pattern weighs in a read: r neurons at random addresses share on
average r I(dv) / 2^n neurons between a pattern and a query that differ in dv bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.models.sdm.counting import (
    LOG2,
    check_positive,
    check_radii,
    check_whole,
    log_choose,
    log_outside_both,
)

METHODS = ("exact", "book")
# Numbers in one temporary: 2**18 float64 are 2 MB.
BLOCK = 2**18
# Where an integrand has fallen by exp(-45) the rest is below rounding.
DECAY = 45.0
BOOK_NODES = 48


def log_circle_intersection(n: int, d: int | Sequence[int] | Tensor, *, method: str = "exact") -> Tensor:
    """ln of the share of {0,1}^n within the Hamming distance d of both of two points dv = 0..n apart.

    n: bits, >= 1. d: the radius, or several, whole, 0..n. Returns float64: (n+1,) for one radius, (*d.shape,
    n+1) for several, on the CPU; -inf where no address lies in both.
    method: "exact", or "book", the integral that Kanerva (1988, app. B) approximates it by, 7 to 14 % low at
    n = 1000, d = 451.

    The exact one sums from the far end. One more differing bit, the odd j-th, takes away the addresses on both
    rims, C(j-1, (j-1)/2) C(n-j, d-(j-1)/2) of them; an even one takes none. Hence

        I(dv) = sum over odd j > dv of C(j-1, (j-1)/2) C(n-j, d-(j-1)/2)            for d < n/2

    All terms are positive, unlike those of the lune formula, which subtracts the same terms from the full
    circle and loses all digits far out. For d >= n/2 it is what the two circles' complements leave.
    Raises ValueError or TypeError for other n, d and method.
    """
    n = check_whole("n", n)
    radii = check_radii(n, d)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    rows = _exact_rows if method == "exact" else _book_rows
    flat = radii.reshape(-1)
    size = max(1, BLOCK // (n + 1))
    table = torch.empty(len(flat), n + 1, dtype=torch.float64)
    for start in range(0, len(flat), size):
        table[start : start + size] = rows(n, flat[start : start + size])
    return table.reshape(*radii.shape, n + 1)


def _exact_rows(n: int, d: Tensor) -> Tensor:
    """(D,) -> (D, n+1)."""
    large = 2 * d >= n
    small = torch.where(large, n - d - 1, d)[:, None]
    half = torch.arange((n + 1) // 2)  # j = 2 half + 1
    rims = log_choose(2 * half, half) + log_choose(n - 2 * half - 1, small - half) - n * LOG2
    tails = torch.logcumsumexp(rims.flip(1), 1).flip(1)
    tails = torch.cat([tails, torch.full_like(tails[:, :1], -math.inf)], 1)
    if bool(large.any()):
        tails = torch.where(large[:, None], log_outside_both(tails[:, :1], tails), tails)
    # Distances 2k-1 and 2k have the odd bits beyond the k-th pair in common.
    return tails[:, (torch.arange(n + 1) + 1) // 2]


def _book_rows(n: int, d: Tensor) -> Tensor:
    """Kanerva's integral (1988, app. B): (D,) -> (D, n+1).

    (1/2pi) integral from dv/n to 1 of exp(-c^2 / (2 (1 - x))) / sqrt(x (1 - x)) dx, c = (2 d - n) / sqrt(n). With
    x = sin^2 tau it is (1/pi) times that of exp(-c^2 / (2 cos^2 tau)), smooth, on [arcsin sqrt(dv/n), pi/2].
    It is symmetric in c; beyond d = n/2 the complement has the same value as between the smaller circles.
    """
    nodes, weights = gauss_legendre(BOOK_NODES)
    square = ((2 * d - n).double() ** 2 / n)[:, None]
    share = torch.arange(n + 1, dtype=torch.float64) / n
    low = share.sqrt().asin()
    start = torch.tan(low) ** 2
    high = (start + 2 * DECAY / square).sqrt().atan()
    total = torch.full((len(d), n + 1), -math.inf, dtype=torch.float64)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        tau = low + (high - low) * (1 + node) / 2
        total = torch.logaddexp(total, math.log(weight / 2) - square / (2 * tau.cos() ** 2))
    small = total + ((high - low) / math.pi).log()
    small[:, -1] = -math.inf  # opposite points: the interval is empty
    large = log_outside_both(torch.special.log_ndtr(-square.sqrt()), small)
    return torch.where(2 * d[:, None] <= n, small, large)


def log_selected_intersection(n: int, k: int | Sequence[int] | Tensor) -> Tensor:
    """ln of the share of neurons that two addresses dv = 0..n apart both activate, by selected coordinates.

    Jaeckel's design (1989): a neuron looks at k of the n coordinates, chosen at random, and is active where
    all k agree with its own random bits. One address activates 2^-k of the neurons; a second one dv bits away
    those of them that look at none of these bits, C(n-dv, k) / C(n, k). Hence

        I(dv) = 2^-k C(n-dv, k) / C(n, k)

    (n+1,) for one k, (*k.shape, n+1) for several, whole, 0..n; -inf for dv > n - k. float64.
    """
    n = check_whole("n", n)
    selected = check_radii(n, k, "k")[..., None]
    other = n - torch.arange(n + 1)
    return log_choose(other, selected) - log_choose(torch.tensor(n), selected) - selected.double() * LOG2


def expected_shared_neurons(
    n: int, d: int | Sequence[int] | Tensor, neurons: float, *, method: str = "exact"
) -> Tensor:
    """How many of `neurons` random neurons two points dv = 0..n apart activate in common: (*d.shape, n+1).

    r I(dv) / 2^n. neurons: r, above 0, also as large as 2**64. n, d, method: as in `log_circle_intersection`.
    """
    log_neurons = check_positive("neurons", neurons)
    return (log_circle_intersection(n, d, method=method) + log_neurons).exp()


@functools.cache
def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss-Legendre rule on [-1, 1]: (count,), (count,)."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights)
