"""Exponentials around the circle intersection, and where they really bound it.

The sum behind the intersection has a largest term, that is an exponential in dv to first order (Bricken and
Pehlevan 2021, app. B). The largest term is below the sum, and above it once multiplied by how many terms there
are; its approximations are so only where they are good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.models.sdm.counting import LOG2, check_whole, log_choose
from hopdeq_lwpf.models.sdm.intersections import log_circle_intersection

FORMS = ("normal", "taylor", "term")
# What rounding may do to the difference of two logarithms.
SLACK = 1e-10


@dataclass(frozen=True)
class ExponentialBounds:
    """All (n+1,), over dv = 0..n, float64: ln of shares of the space; the flags are bool.

    lower, upper: the largest term, and it times the number of terms. exact: the intersection itself.
    lower_holds, upper_holds: where lower <= exact, and where exact <= upper.
    beta: the slope of the "taylor" form over the cosine, `analytic_beta`.
    """

    lower: Tensor
    upper: Tensor
    exact: Tensor
    lower_holds: Tensor
    upper_holds: Tensor
    beta: float


def analytic_beta(n: int, d: int) -> float:
    """(n - 2d)^2 / (4n): the slope of ln of the largest term over the cosine 1 - 2 dv / n, to first order.

    The fitted beta (`fit_beta`) is larger, since the number of terms falls with dv too. n: bits. d: radius,
    0..n. Raises ValueError or TypeError for others.
    """
    n = check_whole("n", n)
    return (n - 2 * check_whole("d", d, 0, n)) ** 2 / (4 * n)


def exponential_bounds(n: int, d: int, *, form: str = "normal") -> ExponentialBounds:
    """Lower and upper exponential bounds of the circle intersection, with where they hold.

    n: bits. d: radius, 0..n. form, of the largest term:

    - "normal": 2 / (pi sqrt(dv (n - dv))) exp(-(n - 2d)^2 / (2 (n - dv))), its normal approximation, as
      published; inf at dv = 0 and dv = n, where it says nothing.
    - "taylor": the exponent to first order, -(n - 2d)^2 (1 + dv/n) / (2n): an exponential in dv but for the
      root in front.
    - "term": the term itself, C(dv, dv/2) C(n - dv, d - dv/2) / 2^n for even dv; it always holds.

    The published two are no bounds at small n: at n = 64, d = 11 "normal" lies above the exact value from dv = 1
    to 22. Raises ValueError or TypeError for other arguments.
    """
    n = check_whole("n", n)
    d = check_whole("d", d, 0, n)
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    apart = torch.arange(n + 1)
    exact = log_circle_intersection(n, d)
    lower = _log_largest_term(n, d, apart) if form == "term" else _log_normal_term(n, d, apart, form)
    count = _terms(n, d, apart)
    upper = torch.where(count > 0, lower + count.log(), -math.inf)
    return ExponentialBounds(
        lower,
        upper,
        exact,
        lower <= exact + SLACK,
        upper >= exact - SLACK,
        analytic_beta(n, d),
    )


def _log_normal_term(n: int, d: int, apart: Tensor, form: str) -> Tensor:
    dv = apart.double()
    front = math.log(2 / math.pi) - (dv * (n - dv)).log() / 2
    if form == "taylor":
        return front - (n - 2 * d) ** 2 * (1 + dv / n) / (2 * n)
    return torch.where(dv < n, front - (n - 2 * d) ** 2 / (2 * (n - dv)), math.inf)


def _log_largest_term(n: int, d: int, apart: Tensor) -> Tensor:
    """C(dv, i) C(n - dv, j) / 2^n is the number of points i bits off within dv and j bits off outside it."""
    rest = n - apart
    outside = torch.minimum(d - (apart + 1) // 2, rest // 2)
    return log_choose(apart, apart // 2) + log_choose(rest, outside) - n * LOG2


def _terms(n: int, d: int, apart: Tensor) -> Tensor:
    """How many (i, j) have max(i, dv - i) + j <= d, 0 <= i <= dv, 0 <= j <= n - dv: (n+1,), float64.

    For e = max(i, dv - i), from ceil(dv/2) to min(d, dv), there are min(d - e, n - dv) + 1 values of j.
    """
    rest = n - apart
    low, high = (apart + 1) // 2, apart.clamp(max=d)
    # Up to `full` all n - dv + 1 values of j are within reach.
    full = torch.minimum(torch.maximum(d - rest, low), high + 1)
    count = (full - low) * (rest + 1)
    count = count + (high - full + 1) * (d + 1) - (high * (high + 1) - full * (full - 1)) // 2
    middle = torch.minimum(d - low, rest) + 1  # i = dv - i is one term, not two
    count = 2 * count - torch.where(apart % 2 == 0, middle, 0)
    return torch.where(low <= high, count, 0).double()
