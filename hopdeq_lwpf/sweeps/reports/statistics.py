"""Confidence intervals and paired tests: bootstrap over queries; Student's t and sign flips over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
EXACT = 12  # differences of which all sign flips, 4,096, are looked at
FLIPS = 20_000  # drawn where there are more; a p of 0.05 is then known to about 0.0015


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; all NaN where there was nothing to average."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Percentile bootstrap over `size` queries; one object for all settings makes them paired.

    The same draws of queries serve every call: two settings that were asked the same queries are resampled
    together, so `difference` has the interval of the paired difference, which is narrower than what two
    separate intervals suggest where the settings agree on most queries. An interval of no width at
    a share of 0 or 1 says only that all queries agreed.
    """

    size: int
    counts: Array  # (resamples, size): how often each query was drawn
    confidence: float

    @classmethod
    def draw(cls, size: int, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Bootstrap:
        """Draw the resamples; 1000 of them place a 95 % limit to about 2 % of the interval's width."""
        if size < 1 or resamples < 1 or not 0 < confidence < 1:
            got = f"got {size}, {resamples}, {confidence}"
            raise ValueError(f"needs size >= 1, resamples >= 1 and 0 < confidence < 1, {got}")
        generator = np.random.default_rng(seed)
        counts = generator.multinomial(size, np.full(size, 1 / size), size=resamples)
        return cls(size, counts.astype(np.float64), confidence)

    def mean(self, values: Array) -> Interval:
        """Mean and interval of (size,) values; NaN marks a query that does not count."""
        values = np.asarray(values, dtype=np.float64)
        if values.shape != (self.size,):
            raise ValueError(f"values must have shape ({self.size},), got {values.shape}")
        counted = ~np.isnan(values)
        if not counted.any():
            return Interval(np.nan, np.nan, np.nan)
        drawn = self.counts[:, counted]
        weight = drawn.sum(1)
        means = (drawn @ values[counted])[weight > 0] / weight[weight > 0]
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(means, [tail, 1 - tail])
        return Interval(float(values[counted].mean()), float(low), float(high))

    def difference(self, values: Array, baseline: Array) -> Interval:
        """Mean and interval of values - baseline, paired by query."""
        return self.mean(np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64))


def t_interval(values: Array, confidence: float = 0.95) -> Interval:
    """Mean of a few independent values (seeds) with Student's interval; NaN marks a value that does not count.

    One value has no interval: NaN. The interval supposes values that scatter normally about their mean, and of
    paired differences is the paired t test: without 0 where that test rejects equality at 1 - confidence.
    """
    values = np.asarray(values, dtype=np.float64)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    values = values[~np.isnan(values)]
    if not values.size:
        return Interval(np.nan, np.nan, np.nan)
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, np.nan, np.nan)
    half = (
        t_quantile((1 + confidence) / 2, values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    )
    return Interval(mean, mean - half, mean + half)


def t_test(values: Array) -> float:
    """Two-sided p of Student's test that the mean of the values (paired differences) is 0; NaN marks one to leave out.

    NaN for fewer than two values, and where all are the same number, of which the test knows no scatter. It supposes
    differences that scatter normally; `t_interval` at 1 - p just touches 0.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    # A scatter that is rounding alone would make any difference certain.
    if values.size < 2 or np.ptp(values) <= 1e-9 * np.abs(values).max():
        return math.nan
    t = float(values.mean()) * math.sqrt(values.size) / float(values.std(ddof=1))
    return 2 * _t_tail(abs(t), values.size - 1)


def sign_flip_test(values: Array, seed: int = 0) -> float:
    """Two-sided p of the permutation test that the values (paired differences) lie symmetrically about 0.

    The share of all sign flips, the given signs among them, whose mean is at least as far from 0; NaN marks a value to
    leave out, and is the p of no value. Exact up to 12 values, else of 20,000 draws with `seed`. It supposes no normal
    scatter, but n values allow no p below 2 / 2^n: 0.0625 for five.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not values.size:
        return math.nan
    if values.size <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=values.size)))
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (FLIPS, values.size)) * 2.0 - 1
        signs = np.concatenate([np.ones((1, values.size)), drawn])
    # Sums that are equal but for rounding count as equal.
    reached = np.abs(signs @ values) >= abs(values.sum()) - 1e-9 * np.abs(values).sum()
    return float(reached.mean())


def holm(ps: Sequence[float]) -> list[float]:
    """The p of each test after Holm's correction for all of them: Holm 1979. NaN is no test and stays.

    Whatever the tests depend on each other by, rejecting where it is at most a level rejects any true hypothesis with
    at most that probability.
    """
    order = sorted((p, place) for place, p in enumerate(ps) if not math.isnan(p))
    adjusted, largest = list(ps), 0.0
    for done, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - done) * p))
        adjusted[place] = largest
    return adjusted


def t_quantile(share: float, degrees: int) -> float:
    """The value that Student's t with that many degrees of freedom exceeds with probability 1 - share."""
    if not 0 < share < 1 or degrees < 1:
        raise ValueError(f"needs 0 < share < 1 and degrees >= 1, got {share}, {degrees}")
    if share < 0.5:
        return -t_quantile(1 - share, degrees)
    tail, low, high = 1 - share, 0.0, 1.0
    while _t_tail(high, degrees) > tail:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):  # until the limits are neighbouring numbers
        low, high = (middle, high) if _t_tail(middle, degrees) > tail else (low, middle)
    return high


def _t_tail(t: float, degrees: int) -> float:
    """P(T > t) for t >= 0: a finite sum of powers of the cosine (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return (1 - sine * total) / 2
    return 0.5 - (angle + (sine * total if degrees > 1 else 0.0)) / math.pi
