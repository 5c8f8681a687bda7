"""Bounds beside measurement: what Ramsauer et al. 2021 guarantee, and what softmax retrieval does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hopdeq_lwpf.diagnostics import (
    jacobian_bound,
    one_step_error_bound,
    retrieval_error_bound,
    storage_condition,
)
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.solvers import Picard, Termination, fixed_point

STORES = 1000
# Sharpness is beta times the square of the largest norm: what the bounds depend on.
BANDS = ((1.0, 10.0), (10.0, 100.0), (100.0, 1000.0))
# What rounding leaves of a measured distance in float64, over M.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Store:
    """Patterns (N, d), beta, and one query near each pattern (N, d)."""

    patterns: Tensor
    beta: float
    query: Tensor


def stores(low: float, high: float, count: int = STORES, seed: int = 0) -> Iterator[Store]:
    """Random stores of 2 to 64 patterns of 2 to 64 numbers with sharpness log-uniform from low to high.

    Norms differ by up to a half; queries lie up to .5 M away from their pattern, most of them near.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(least: float, most: float) -> float:
        return least + (most - least) * float(torch.rand((), generator=generator, dtype=torch.float64))

    def rays(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(
            torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1
        )

    for _ in range(count):
        n, d = int(uniform(2, 65)), int(uniform(2, 65))
        patterns = rays(n, d) * (1 - 0.5 * uniform(0, 1) * torch.rand(n, 1, generator=generator).double())
        longest = float(patterns.norm(dim=-1).max())
        beta = math.exp(uniform(math.log(low), math.log(high))) / longest**2
        away = 0.5 * longest * uniform(0, 1) ** 2 * torch.rand(n, 1, generator=generator).double()
        yield Store(patterns, beta, patterns + away * rays(n, d))


@dataclass
class Tally:
    """One bound over all patterns of all stores."""

    name: str
    cases: int = 0
    telling: int = 0
    violations: int = 0
    ratios: list[Tensor] = field(default_factory=list)

    def add(self, measured: Tensor, bound: Tensor, says_nothing: Tensor | float, rounding: float) -> None:
        """measured and bound of some patterns; the bound tells something below `says_nothing`."""
        self.cases += measured.numel()
        self.violations += int((measured > bound + rounding).sum())
        telling = bound < says_nothing
        self.telling += int(telling.sum())
        # Where both are rounding there is nothing to compare.
        seen = telling & (measured > 100 * rounding)
        self.ratios.append((measured[seen] / bound[seen]).reshape(-1))

    def row(self, band: tuple[float, float]) -> dict[str, object]:
        """One line of the table."""
        ratios = torch.cat(self.ratios) if self.ratios else torch.empty(0)
        return {
            "beta M^2": f"{band[0]:g} to {band[1]:g}",
            "bound": self.name,
            "cases": self.cases,
            "telling %": round(100 * self.telling / max(self.cases, 1), 1),
            "above bound": self.violations,
            "measured / bound, median": float(ratios.median()) if ratios.numel() else None,
            "most": float(ratios.max()) if ratios.numel() else None,
        }


def _measure(store: Store, one_step: Tally, jacobian: Tally, retrieval: Tally) -> None:
    patterns, beta, query = store.patterns, store.beta, store.query
    longest = float(patterns.norm(dim=-1).max())
    rounding = ROUNDING * longest
    f = Retrieval(beta)
    x = f.prepare(query, patterns)
    offset = (query - patterns).norm(dim=-1)
    error = (f(query, x) - patterns).norm(dim=-1)
    # Two points of a ball of radius M are never more than 2 M apart.
    one_step.add(error, one_step_error_bound(patterns, beta, offset), 2 * longest, rounding)
    p = f.weights(query[:1], x._replace(start=query[:1]))[0]
    centred = patterns - p @ patterns
    # J is beta times the covariance of the patterns under p, which is at most M^2 without any theorem.
    norm = beta * torch.linalg.matrix_norm(centred.T @ (p[:, None] * centred), 2)
    limit = jacobian_bound(patterns, beta, offset)[:1]
    jacobian.add(norm[None], limit, beta * longest**2, rounding * beta * longest)
    stored = storage_condition(patterns, beta).stored
    if not bool(stored.any()):
        return
    stop = Termination(rtol=1e-15, atol=0.0, max_steps=300)
    end = fixed_point(f, f.prepare(patterns, patterns), patterns, solver=Picard(), stop=stop).state
    moved = (end - patterns).norm(dim=-1)[stored]
    retrieval.add(moved, retrieval_error_bound(patterns, beta)[stored], longest, rounding)


def run(count: int = STORES) -> list[dict[str, object]]:
    """One row a band of sharpness and bound; the retrieval error counts stored patterns only."""
    rows: list[dict[str, object]] = []
    for band in BANDS:
        tallies = [Tally("one-step error"), Tally("Jacobian norm"), Tally("retrieval error, stored")]
        with torch.no_grad():
            for store in stores(*band, count):
                _measure(store, *tallies)
        rows += [tally.row(band) for tally in tallies]
    return rows
