"""torchdeq's solvers, stopped by an oracle: each runs exactly to its first iterate within the tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdeq.solver import get_solver

PEERS: dict[str, tuple[str, dict[str, float]]] = {
    "torchdeq fixed point": ("fixed_point_iter", {}),
    "torchdeq anderson": ("anderson", {}),
    "torchdeq anderson lam 1e-10": ("anderson", {"lam": 1e-10}),
    "torchdeq broyden": ("broyden", {}),
}
LIMIT, FIRST = 600, 8  # the most iterations, and how many are tried first
# Below this length a residual is absolute: at a tolerance of 1e-5 that is our atol of 1e-8.
SHORTEST = 1e-3


@dataclass(frozen=True)
class PeerRun:
    """How many iterations a peer needs, and what it then returns."""

    name: str
    iterations: int
    state: Tensor  # (B, d)
    worst: float  # true residual of the worst query
    unconverged: int

    def call(self, f: Callable[[Tensor], Tensor], z0: Tensor) -> Callable[[], Tensor]:
        """The solve again, with this number of iterations and no test that could end it sooner."""
        return lambda: _solve(self.name, f, z0, self.iterations)


def residual(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """|f(z) - z| / |f(z)| of each query; where |f(z)| < SHORTEST over SHORTEST."""
    image = f(z)
    return (image - z).norm(dim=-1) / image.norm(dim=-1).clamp_min(SHORTEST)


def _solve(name: str, f: Callable[[Tensor], Tensor], z0: Tensor, iterations: int) -> Tensor:
    solver, options = PEERS[name]
    with torch.no_grad():
        state: Tensor = get_solver(solver)(f, z0, max_iter=iterations, tol=0.0, stop_mode="rel", **options)[0]
    return state


@torch.no_grad()
def measure(name: str, f: Callable[[Tensor], Tensor], z0: Tensor, tolerance: float) -> PeerRun | None:
    """The smallest number of iterations whose result meets the tolerance for every query.

    torchdeq returns each query's best iterate, so the residual falls with the iterations: they are doubled until they
    suffice, and bisection finds the number. Where LIMIT iterations do not converge all, that run is reported; None if
    the solver raises.
    """
    low, high = 1, FIRST
    try:
        state = _solve(name, f, z0, high)
        while not _meets(f, state, tolerance) and high < LIMIT:
            low, high = high + 1, min(2 * high, LIMIT)
            state = _solve(name, f, z0, high)
        while low < high and _meets(f, state, tolerance):
            middle = (low + high) // 2
            tried = _solve(name, f, z0, middle)
            if _meets(f, tried, tolerance):
                high, state = middle, tried
            else:
                low = middle + 1
    except (RuntimeError, torch.linalg.LinAlgError):
        return None
    left = residual(f, state)
    return PeerRun(name, high, state, float(left.nan_to_num(1e9).max()), int((~(left <= tolerance)).sum()))


def _meets(f: Callable[[Tensor], Tensor], state: Tensor, tolerance: float) -> bool:
    return bool((residual(f, state) <= tolerance).all())
