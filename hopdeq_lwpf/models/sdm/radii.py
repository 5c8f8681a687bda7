"""Which Hamming radius is best: the critical distance, and the optima of three objectives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.models.sdm.addresses import log_space_fraction, radius_for_fraction
from hopdeq_lwpf.models.sdm.counting import check_fraction, check_positive, check_radii, check_whole
from hopdeq_lwpf.models.sdm.intersections import log_circle_intersection
from hopdeq_lwpf.models.sdm.signals import log_noise, log_other_patterns, read_statistics

OBJECTIVES = ("snr", "memory", "critical_distance")
# Numbers in one table of radii by distances: 2**18 float64 are 2 MB.
BLOCK = 2**18


def critical_distance(
    n: int,
    d: int | Sequence[int] | Tensor,
    *,
    neurons: float,
    patterns: float,
    variance: str = "midpoint",
    design: str = "kanerva",
    first: int = 5,
) -> Tensor:
    """The largest dv such that reads from `first`, ..., dv bits away all end closer: int64, shape of d.

    How far a query may be from its pattern and still be drawn to it (Kanerva 1988, ch. 7): at most n // 2, where a
    random query is; beyond that even a read that ends anywhere ends closer. 0 where a read from `first` bits away
    already ends no closer, or first > n // 2. first: at least 1; the default 5 is the authors',
    since nearer queries may lose to the few bits that any read gets wrong. Other arguments and errors: as in
    `read_statistics`.
    """
    n = check_whole("n", n)
    radii, first = check_radii(n, d), check_whole("first", first)
    before = torch.arange(first, max(first, n // 2 + 1))
    parts = [torch.zeros(0, dtype=torch.int64)]
    for some in _blocks(n, radii):
        read = read_statistics(n, some, neurons=neurons, patterns=patterns, variance=variance, design=design)
        closer = (read.distance[:, first : n // 2 + 1] < before).long().cumprod(1).sum(1)
        parts.append(torch.where(closer > 0, first - 1 + closer, 0))
    return torch.cat(parts).reshape(radii.shape)


def _blocks(n: int, radii: Tensor) -> Iterator[Tensor]:
    """The radii in a row, a table of n + 1 distances of bounded size at a time."""
    return iter(radii.reshape(-1).split(max(1, BLOCK // (n + 1))))


@dataclass(frozen=True)
class OptimalRadius:
    """radius: the smallest best one; ties: all radii that are as good, in order; value: of the objective there.

    fraction: the share p of the space within the radius; the closed forms give the exact optimum p*, from which
    the radius is rounded up, and their value is the one at p*. capacity: for "memory", how many patterns fit.
    """

    radius: int
    ties: tuple[int, ...]
    value: float
    fraction: float
    capacity: float | None = None


def optimal_radius(
    n: int,
    *,
    neurons: float,
    patterns: float | None = None,
    objective: str = "snr",
    exact_moments: bool = False,
    retrieval_probability: float = 0.5,
) -> OptimalRadius:
    """The Hamming radius that is best for an objective (Bricken and Pehlevan 2021, app. B).

    n: bits. neurons: r, above 0. patterns: m, at least 1; needed but for "memory", which finds how many fit.
    objective:

    - "snr": the largest signal-to-noise ratio of a query equal to its pattern, SNR^2 = p r / (1 + p m + p^3 m r),
      hence p* = (2 m r)^(-1/3).
    - "memory": the most patterns m such that a query equal to its pattern reads all n bits right with
      `retrieval_probability`, m = ((p r)^2 / z^2 - p r) / (p^2 r + (p^2 r)^2) + 1, z = Phi^-1(P^(1/n)).
    - "critical_distance": the largest `critical_distance`.

    exact_moments: False puts v = r p^2 for the neurons that two random patterns share, in closed form, and
    "midpoint" for the critical distance, as published. True tries all radii with the exact moments of random
    patterns (variance="moments"): at n = 64, r = 2**64, m = 1024 the best radius for "snr" is then 8, not 11.
    At so small n the overlap of random patterns has a heavy tail, of which a variance tells little.
    retrieval_probability: P, above 2^-n; the default .5 is that of the authors' code (its comment says .99).
    Raises ValueError or TypeError for other arguments.
    """
    n = check_whole("n", n)
    log_neurons = check_positive("neurons", neurons)
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if not isinstance(exact_moments, bool):
        raise TypeError(f"exact_moments must be True or False, got {exact_moments!r}")
    if objective == "memory":
        if patterns is not None:
            raise ValueError('patterns must be left out with objective="memory", which finds how many fit')
        z = _needed_snr(n, check_fraction("retrieval_probability", retrieval_probability))
        return _most_memory(n, neurons, z) if exact_moments else _published_memory(n, float(neurons), z)
    if patterns is None:
        raise ValueError(f'patterns is needed for objective="{objective}": how many are stored')
    log_other_patterns(patterns)
    if objective == "snr" and not exact_moments:
        p = math.exp(-(math.log(2 * patterns) + log_neurons) / 3)
        if not p < 1:
            raise ValueError(f"2 neurons patterns must exceed 1, got {neurons!r} and {patterns!r}")
        r, m = float(neurons), float(patterns)
        radius = radius_for_fraction(n, p)
        return OptimalRadius(radius, (radius,), math.sqrt(p * r / (1 + p * m + p**3 * m * r)), p)
    return _best(n, _scores(n, neurons, patterns, objective, exact_moments))


def _scores(n: int, neurons: float, patterns: float, objective: str, exact_moments: bool) -> Tensor:
    """The objective at all radii: (n+1,)."""
    radii = torch.arange(n + 1)
    if objective == "critical_distance":
        variance = "moments" if exact_moments else "midpoint"
        return critical_distance(n, radii, neurons=neurons, patterns=patterns, variance=variance).double()
    reads = (
        read_statistics(n, some, neurons=neurons, patterns=patterns, variance="moments")
        for some in _blocks(n, radii)
    )
    return torch.cat([read.snr[:, 0] for read in reads])


def _best(n: int, scores: Tensor) -> OptimalRadius:
    value = float(scores.max())
    # Values that differ by rounding only are ties.
    ties = tuple((scores >= value - 1e-12 * abs(value)).nonzero()[:, 0].tolist())
    return OptimalRadius(ties[0], ties, value, float(log_space_fraction(n, ties[0]).exp()))


def _needed_snr(n: int, probability: float) -> float:
    """z with Phi(z)^n = probability."""
    wrong = -math.expm1(math.log(probability) / n)
    if wrong >= 0.5:
        raise ValueError(
            f"retrieval_probability must exceed 2^-n = {0.5**n:g}, what guessing gives, got {probability!r}"
        )
    return -float(torch.special.ndtri(torch.tensor(wrong, dtype=torch.float64)))


def _published_memory(n: int, neurons: float, z: float) -> OptimalRadius:
    """The root of 2 r^2 p^3 - 3 r z^2 p^2 - z^2 = 0, where dm/dp = 0.

    With y = p r neurons in reach it is y^3 - 1.5 z^2 y^2 - r z^2 / 2 = 0, convex and rising beyond its only
    positive root, so that Newton's steps from above never overshoot.
    """
    square, constant = 1.5 * z * z, neurons * z * z / 2
    y, last = square + constant ** (1 / 3), math.inf
    while y < last:
        last, y = y, y - (y * y * (y - square) - constant) / (y * (3 * y - 2 * square))
    p = last / neurons
    if not p < 1:
        raise ValueError(f"neurons must be more than {neurons!r} for any pattern to fit at n = {n}")
    v = p * p * neurons
    fit = (last * last / z**2 - last) / (v + v * v) + 1
    radius = radius_for_fraction(n, p)
    return OptimalRadius(radius, (radius,), fit, p, fit)


def _most_memory(n: int, neurons: float, z: float) -> OptimalRadius:
    """m from s^2 / z^2 = s + (m - 1) noise at every radius."""
    log_neurons = check_positive("neurons", neurons)
    fits = []
    for some in _blocks(n, torch.arange(n + 1)):
        log_signal = log_circle_intersection(n, some) + log_neurons
        noise = log_noise(n, log_signal, exact=True)
        signal = log_signal[:, 0].exp()
        others = (signal / z**2 - 1) * (log_signal[:, 0] - noise).exp()
        fits.append(torch.where(signal >= z * z, others + 1, 0.0))
    best = _best(n, torch.cat(fits))
    if not best.value:
        raise ValueError(f"neurons must be more than {neurons!r} for any pattern to fit at n = {n}")
    return replace(best, capacity=best.value)
