"""Signal, noise and fidelity of a read from a Sparse Distributed Memory.

A query dv bits from a stored pattern reads r I(dv) copies of it (the signal) and those of the m - 1 other
patterns, which lie some n/2 bits away (the noise). A bit comes out right with probability Phi(signal / noise)
(Kanerva 1988, ch. 7; Bricken and Pehlevan 2021, app. B). All is kept as logarithms, so that 2**64 neurons and
far smaller intersections neither overflow nor vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.models.sdm.addresses import log_space_fraction
from hopdeq_lwpf.models.sdm.counting import as_number, check_positive, check_radii, check_whole, log_binomial
from hopdeq_lwpf.models.sdm.intersections import log_circle_intersection, log_selected_intersection

VARIANCES = ("midpoint", "moments", "kanerva")
DESIGNS: dict[str, Callable[..., Tensor]] = {
    "kanerva": log_circle_intersection,
    "jaeckel": log_selected_intersection,
}


@dataclass(frozen=True)
class ReadStatistics:
    """All (*d.shape, n+1) over the distance dv = 0..n of the query from its pattern, float64."""

    log_signal: Tensor
    log_variance: Tensor

    @property
    def signal(self) -> Tensor:
        """Copies of the pattern that the read meets, s = r I(dv)."""
        return self.log_signal.exp()

    @property
    def variance(self) -> Tensor:
        """Of the sum that a bit is read from."""
        return self.log_variance.exp()

    @property
    def snr(self) -> Tensor:
        """Signal over the standard deviation of the noise; 0 where there is no signal."""
        # Where neither is left, -inf minus -inf, nothing is read.
        there = self.log_signal > -math.inf
        return torch.where(there, self.log_signal - self.log_variance / 2, -math.inf).exp()

    @property
    def fidelity(self) -> Tensor:
        """Probability Phi(SNR) that a bit is read right."""
        return torch.special.ndtr(self.snr)

    @property
    def distance(self) -> Tensor:
        """Bits wrong on average after the read, n (1 - Phi(SNR)), also where the fidelity rounds to 1."""
        # Unlike ndtr, log_ndtr keeps its digits in the far tail.
        return (self.log_signal.shape[-1] - 1) * torch.special.log_ndtr(-self.snr).exp()


def read_statistics(
    n: int,
    d: int | Sequence[int] | Tensor,
    *,
    neurons: float,
    patterns: float,
    variance: str = "midpoint",
    design: str = "kanerva",
) -> ReadStatistics:
    """Signal, variance, SNR, fidelity and new distance of one read, for a query dv = 0..n from its pattern.

    n: bits. d: one size of the activated set or several, whole, 0..n. neurons: r, above 0, also 2**64.
    patterns: m, at least 1. design: "kanerva", neurons within the Hamming radius d of the address are active;
    "jaeckel", those that agree with it in all of their d selected coordinates (`log_selected_intersection`).
    variance:

    - "midpoint": s + (m - 1)(v + v^2), with v the signal at dv = n/2 (rounded down), as the authors' code has
      it. v is 0 for d < n/4, so that small radii look better than they are.
    - "moments": s + (m - 1)(r E[I] + r^2 E[I^2]) over random patterns, dv ~ Binomial(n, 1/2); E[I] = p^2.
      Exact where the number of neurons in a region is Poisson.
    - "kanerva": m (r p^2 + r^2 h^2 / (4n)), h = exp(-c^2)/pi, c = (2d - n)/sqrt(n), the older rule, the same for
      all dv: h is the slope of the book's integral at n/2. Only for design="kanerva".

    Raises ValueError or TypeError for other arguments.
    """
    n = check_whole("n", n)
    log_neurons, log_others = check_positive("neurons", neurons), log_other_patterns(patterns)
    if design not in DESIGNS:
        raise unknown("design", design, DESIGNS)
    if variance not in VARIANCES:
        raise unknown("variance", variance, VARIANCES)
    log_signal = DESIGNS[design](n, d) + log_neurons
    if variance == "kanerva":
        if design != "kanerva":
            raise ValueError(f"variance 'kanerva' is for design 'kanerva', not {design!r}; use 'moments'")
        constant = _kanerva_variance(n, check_radii(n, d), log_neurons) + math.log(patterns)
        return ReadStatistics(log_signal, constant[..., None].expand_as(log_signal))
    noise = log_noise(n, log_signal, exact=variance == "moments")
    return ReadStatistics(log_signal, torch.logaddexp(log_signal, noise[..., None] + log_others))


def log_noise(n: int, log_signal: Tensor, *, exact: bool) -> Tensor:
    """ln of the variance that one other pattern adds, r E[I] + r^2 E[I^2] or v + v^2: (*, n+1) -> (*)."""
    if not exact:
        met = log_signal[..., n // 2]
        return torch.logaddexp(met, 2 * met)
    weights = log_binomial(n)
    first, second = weights + log_signal, weights + 2 * log_signal
    return torch.logaddexp(torch.logsumexp(first, -1), torch.logsumexp(second, -1))


def _kanerva_variance(n: int, d: Tensor, log_neurons: float) -> Tensor:
    """ln of r p^2 + r^2 h^2 / (4n): shape of d."""
    log_slope = -((2 * d - n).double() ** 2) / n - math.log(math.pi)
    spread = 2 * (log_neurons + log_slope) - math.log(4 * n)
    return torch.logaddexp(2 * log_space_fraction(n, d) + log_neurons, spread)


def log_other_patterns(patterns: float) -> float:
    """ln(m - 1), -inf for a single pattern; raises unless m is a finite number of at least 1."""
    number = as_number(patterns)
    if not 1 <= number < math.inf:
        raise ValueError(f"patterns must be a finite number of at least 1, got {patterns!r}")
    return math.log(number - 1) if number > 1 else -math.inf
