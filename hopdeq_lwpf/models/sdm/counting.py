"""Counts of binary addresses in log space, and the checks of the arguments that all of the analysis shares."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

# What is drawn from one seed: a stream of its own for each kind. Patterns have the plain seed, which is the same as 0.
COUNT_DRAWS, ADDRESS_DRAWS, DATA_SET_DRAWS = 1, 2, 3

LOG2 = math.log(2.0)


def check_whole(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """`value` as a plain int; raises unless it is whole and least <= value (<= most)."""
    allowed = f"a whole number of at least {least}" + ("" if most is None else f" and at most {most}")
    try:
        whole = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, got {value!r}") from None
    if isinstance(value, bool) or whole < least or (most is not None and whole > most):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return whole


def check_positive(name: str, value: object, least: float = 0.0) -> float:
    """ln(value), also of whole numbers as large as 2**128; raises unless least < value < inf."""
    number = as_number(value)
    if not least < number < math.inf:
        raise ValueError(f"{name} must be a finite number above {least:g}, got {value!r}")
    return math.log(number)


def check_fraction(name: str, value: object) -> float:
    """`value` as a float; raises unless it lies strictly between 0 and 1."""
    number = as_number(value)
    if not 0 < number < 1:
        raise ValueError(f"{name} must be a number strictly between 0 and 1, got {value!r}")
    return number


def as_number(value: object) -> float:
    """A real number as a float, inf where it is too large for one, NaN where it is none at all."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_radii(n: int, d: int | Sequence[int] | Tensor, name: str = "d") -> Tensor:
    """The radii as an int64 tensor on the CPU; raises unless all are whole and 0 <= d <= n."""
    if isinstance(d, Tensor) and d.ndim:
        if d.is_floating_point() or d.is_complex() or d.dtype == torch.bool:
            raise TypeError(f"{name} must hold whole numbers, got dtype {d.dtype}; use {name}.long()")
        bad = (d < 0) | (d > n)
        if bool(bad.any()):
            raise ValueError(f"{name} must be between 0 and n = {n}, got {int(d[bad][0])}")
        return d.detach().to("cpu", torch.int64)
    if isinstance(d, Sequence) and not isinstance(d, str):
        return torch.tensor([check_whole(name, one, 0, n) for one in d], dtype=torch.int64)
    return torch.tensor(check_whole(name, d, 0, n))


def log_choose(n: Tensor, k: Tensor) -> Tensor:
    """ln C(n, k) for n >= 0, -inf where k < 0 or k > n: broadcast shape, float64."""
    # One logarithm a factorial, not one a pair: the table is short and the pairs are many.
    factorials = (
        torch.lgamma(torch.arange(1, int(n.max()) + 2, dtype=torch.float64)) if n.numel() else n.double()
    )
    inside = (k >= 0) & (k <= n)
    taken = torch.where(inside, k, 0)
    counted = factorials[n] - factorials[taken] - factorials[n - taken]
    return torch.where(inside, counted, -math.inf)


def log_binomial(n: int) -> Tensor:
    """ln of the shares C(n, k) / 2^n of the addresses at distance k = 0..n of a point: (n+1,)."""
    return log_choose(torch.tensor(n), torch.arange(n + 1)) - n * LOG2


def log1mexp(x: Tensor) -> Tensor:
    """ln(1 - exp(x)) for x <= 0, without cancellation at either end."""
    near = x > -LOG2
    return torch.where(near, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def log_outside_both(one: Tensor, both: Tensor) -> Tensor:
    """ln(1 - 2 e^one + e^both): what two sets of share e^one, e^both of it common, leave of the space."""
    common = torch.where(one > -math.inf, both - one, 0.0).exp()
    return log1mexp(one + torch.log(2 - common))
