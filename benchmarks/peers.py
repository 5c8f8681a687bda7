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
LIMIT = 600


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
    """|f(z) - z| / |f(z)| of each query."""
    image = f(z)
    return (image - z).norm(dim=-1) / image.norm(dim=-1).clamp_min(1e-30)


def _solve(name: str, f: Callable[[Tensor], Tensor], z0: Tensor, iterations: int) -> Tensor:
    solver, options = PEERS[name]
    with torch.no_grad():
        state: Tensor = get_solver(solver)(f, z0, max_iter=iterations, tol=0.0, stop_mode="rel", **options)[0]
    return state


@torch.no_grad()
def measure(name: str, f: Callable[[Tensor], Tensor], z0: Tensor, tolerance: float) -> PeerRun | None:
    """The smallest number of iterations whose result meets the tolerance for every query.

    torchdeq returns each query's best iterate, so the residual falls with the iterations and bisection finds
    the number. Where LIMIT iterations do not converge all, that run is reported; None if the solver raises.
    """
    try:
        state = _solve(name, f, z0, LIMIT)
        worst = residual(f, state)
        if bool((worst.nan_to_num(1e9) > tolerance).any()):
            return PeerRun(
                name, LIMIT, state, float(worst.nan_to_num(1e9).max()), int((~(worst <= tolerance)).sum())
            )
        low, high = 1, LIMIT
        while low < high:
            middle = (low + high) // 2
            good = bool((residual(f, _solve(name, f, z0, middle)) <= tolerance).all())
            low, high = (low, middle) if good else (middle + 1, high)
        state = _solve(name, f, z0, high)
    except (RuntimeError, torch.linalg.LinAlgError):
        return None
    worst = residual(f, state)
    return PeerRun(name, high, state, float(worst.max()), int((worst > tolerance).sum()))
