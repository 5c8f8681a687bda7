"""How the gradient of an equilibrium is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hopdeq_lwpf._types import AdjointReport, Matvec, Result, unknown
from hopdeq_lwpf.solvers.anderson import Anderson
from hopdeq_lwpf.solvers.base import Solver, check_count, check_number, pick
from hopdeq_lwpf.solvers.implicit import attach
from hopdeq_lwpf.solvers.linear import LinearOutcome, conjugate_gradient, gmres
from hopdeq_lwpf.solvers.loop import Outcome, run
from hopdeq_lwpf.solvers.picard import Picard
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.view import FlatFunction

# An adjoint residual of so many units in the last place of f passes for converged.
FLOOR = 50


class Adjoint(Protocol):
    """A frozen dataclass: runs the solve and gives its result a gradient."""

    @property
    def drops_z0(self) -> bool:
        """Whether a gradient to the starting state is lost (at an equilibrium the true one is zero)."""
        ...

    def solve(
        self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool
    ) -> tuple[Tensor, Outcome, AdjointReport | None]:
        """The state with its gradient (B, n), the outcome of the solve, and a report for the backward pass."""
        ...


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: one linear solve, whatever the number of forward steps.

    solver: "cg" needs the metric that f declares; "gmres" works for any Jacobian; "picard" and "anderson"
    iterate u = g + J^T u. "auto": CG where f declares a metric, else GMRES; rows in which CG meets negative
    curvature (a saddle) are finished by GMRES.
    rtol: of |g - (I - J^T) u| / |g| for each problem, so that the scale of the loss does not matter. 1e-6
    costs three products more than 1e-3 (7 against 4) and leaves the error to the forward solve.
    max_steps: vector-Jacobian products.
    """

    solver: str = "auto"
    rtol: float = 1e-6
    max_steps: int = 200

    drops_z0 = True

    def __post_init__(self) -> None:
        if self.solver not in ADJOINT_SOLVERS:
            raise unknown("adjoint solver", self.solver, ADJOINT_SOLVERS)
        check_number("rtol", self.rtol, 0.0, 1.0, open_low=True)
        check_count("max_steps", self.max_steps, 1)

    def solve(
        self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool
    ) -> tuple[Tensor, Outcome, AdjointReport | None]:
        with torch.no_grad():
            outcome = run(f, z0, solver, stop, trace=trace)
        report = AdjointReport()
        return attach(f, outcome.z, self._linear, report), outcome, report

    def _linear(self, vjp: Matvec, metric: Matvec | None, g: Tensor, eps: float) -> tuple[LinearOutcome, str]:
        outcome, name = self._solve(vjp, metric, g, max(self.rtol, 4 * torch.finfo(g.dtype).eps))
        # What rounding leaves of the residual is not a failure to converge.
        rounded = (outcome.result == int(Result.MAX_STEPS)) & (outcome.residual <= FLOOR * eps)
        outcome.result = outcome.result.masked_fill(rounded, int(Result.CONVERGED))
        return outcome, name

    def _solve(self, vjp: Matvec, metric: Matvec | None, g: Tensor, rtol: float) -> tuple[LinearOutcome, str]:
        name = self.solver if self.solver != "auto" else "gmres" if metric is None else "cg"
        if name == "gmres":
            return gmres(vjp, g, torch.zeros_like(g), rtol, self.max_steps), name
        if name != "cg":
            return _iterate(vjp, g, Picard() if name == "picard" else Anderson(), rtol, self.max_steps), name
        if metric is None:
            raise ValueError(
                "adjoint solver 'cg' needs a metric in which the Jacobian is self-adjoint and this f declares "
                "none; use Implicit(solver='gmres') or 'auto'"
            )
        outcome = conjugate_gradient(vjp, g, metric, rtol, self.max_steps)
        saddles = outcome.result == int(Result.DIVERGED)
        if self.solver == "cg" or not bool(saddles.any()):
            return outcome, name
        second = gmres(vjp, g, outcome.u, rtol, self.max_steps)
        return LinearOutcome(
            pick(saddles, second.u, outcome.u),
            torch.where(saddles, second.result, outcome.result),
            torch.where(saddles, second.residual, outcome.residual),
            outcome.steps + torch.where(saddles, second.steps, 0),
        ), "cg+gmres"


@dataclass(frozen=True)
class OneStep:
    """Jacobian-free: the gradient of one application of f at the equilibrium (Fung et al. 2022).

    Cheap, and far from exact where the map contracts slowly: 95 % error at contractions of .3 to .99.
    """

    drops_z0 = True

    def solve(
        self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool
    ) -> tuple[Tensor, Outcome, AdjointReport | None]:
        with torch.no_grad():
            outcome = run(f, z0, solver, stop, trace=trace)
        return attach(f, outcome.z, _one_step, AdjointReport()), outcome, None


@dataclass(frozen=True)
class Unrolled:
    """Ordinary autograd through every iteration of the solver; memory grows with the steps.

    The one adjoint that keeps the gradient to z0 and can be differentiated any number of times.
    """

    drops_z0 = False

    def solve(
        self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool
    ) -> tuple[Tensor, Outcome, AdjointReport | None]:
        outcome = run(f, z0, solver, stop, trace=trace, drop=not torch.is_grad_enabled())
        # An empty batch takes no step, yet what f depends on must get its (zero) gradient.
        return (outcome.z if len(z0) else f(z0)), outcome, None


ADJOINTS: dict[str, Callable[[], Adjoint]] = {"implicit": Implicit, "onestep": OneStep, "unrolled": Unrolled}
ADJOINT_SOLVERS = ("auto", "cg", "gmres", "picard", "anderson")


def make_adjoint(spec: str | Adjoint) -> Adjoint:
    """The adjoint for a name or an object."""
    if isinstance(spec, str):
        if spec not in ADJOINTS:
            raise unknown("adjoint", spec, ADJOINTS)
        return ADJOINTS[spec]()
    if isinstance(spec, type) or not callable(getattr(spec, "solve", None)):
        raise TypeError(f"adjoint must be a name or an object such as Implicit(rtol=1e-6), got {spec!r}")
    return spec


def _one_step(vjp: Matvec, metric: Matvec | None, g: Tensor, eps: float) -> tuple[LinearOutcome, str]:
    zeros = torch.zeros(g.shape[0], dtype=torch.int64, device=g.device)
    return LinearOutcome(g, zeros, torch.zeros_like(g[:, 0]), zeros), "one step"


class _AdjointFunction(FlatFunction):
    """u -> g + J^T u as a function for the loop."""

    def __init__(self, vjp: Matvec, g: Tensor) -> None:
        self._vjp = vjp
        self._g = g
        self.has_energy = self.autocast = False
        self.eps = torch.finfo(g.dtype).eps

    def __call__(self, flat: Tensor) -> Tensor:
        return self._g + self._vjp(flat)

    def narrow(self, live: Tensor) -> None:
        return None


def _iterate(vjp: Matvec, g: Tensor, solver: Solver, rtol: float, max_steps: int) -> LinearOutcome:
    """u = g + J^T u by the forward loop, on gradients of unit norm: rtol then is relative to |g|."""
    size = torch.linalg.vector_norm(g, dim=-1)
    unit = g / size.clamp_min(torch.finfo(g.dtype).tiny)[:, None]
    outcome = run(
        _AdjointFunction(vjp, unit), unit, solver, Termination(rtol=0.0, atol=rtol, max_steps=max_steps)
    )
    residual = torch.linalg.vector_norm(unit + vjp(outcome.z) - outcome.z, dim=-1)
    return LinearOutcome(outcome.z * size[:, None], outcome.result, residual, outcome.evaluations)
