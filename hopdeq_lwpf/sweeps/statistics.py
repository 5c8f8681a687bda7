"""Bootstrap confidence intervals over queries, and paired differences between settings."""

from __future__ import annotations

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
