"""Confidence intervals: bootstrap over queries, Student's t over seeds; paired differences between settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


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
