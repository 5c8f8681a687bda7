"""How the gradient of an equilibrium is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from hopdeq_lwpf._types import AdjointReport, Result, identity, unknown
from hopdeq_lwpf.imports import class_at
from hopdeq_lwpf.solvers import transforms
from hopdeq_lwpf.solvers.anderson import Anderson
from hopdeq_lwpf.solvers.base import Solver, check_count, check_number, pick, transformed
from hopdeq_lwpf.solvers.eqprop import Nudge, attach_contrast
from hopdeq_lwpf.solvers.implicit import attach, gradient_of
from hopdeq_lwpf.solvers.linear import (
    FLOOR,
    LinearOutcome,
    System,
    conjugate_gradient,
    gmres,
    minres,
    neumann,
)
from hopdeq_lwpf.solvers.loop import Outcome, run
from hopdeq_lwpf.solvers.picard import Picard
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.view import FlatFunction


@dataclass
class Solved:
    """A solve with its gradient attached."""

    state: Tensor  # (B, n)
    outcome: Outcome
    report: AdjointReport | None = None  # of the backward pass
    read: Tensor | None = None  # what f reads out at the state, where that came with the gradient


class Adjoint(Protocol):
    """A frozen dataclass: runs the solve and gives its result a gradient."""

    @property
    def drops_z0(self) -> bool:
        """Whether a gradient to the starting state is lost (at an equilibrium the true one is zero)."""
        ...

    def solve(self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool) -> Solved:
        """The state with its gradient, the outcome of the solve, and a report for the backward pass."""
        ...


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: one linear solve, whatever the number of forward steps.

    solver: "cg" and "minres" need the metric that f declares; "gmres" works for any Jacobian; "picard" and
    "anderson" iterate u = g + J^T u. "auto": CG where f declares a metric, else GMRES; rows in which CG meets
    negative curvature (a saddle) are solved by MINRES, which needs no more memory than CG.
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

    def solve(self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool) -> Solved:
        if transformed():
            if trace:
                raise ValueError("trace=True is not possible under torch.func; solve once outside of it")
            return Solved(*transforms.solve(f, z0, solver, stop, self.linear))
        outcome = _forward(self, f, z0, solver, stop, trace)
        report = AdjointReport()
        state, read = attach(f, outcome.z, self.linear, report)
        return Solved(state, outcome, report, read)

    def linear(self, system: System) -> tuple[LinearOutcome, str]:
        """u of the system, and how it was found."""
        # The square of a small gradient underflows, that of a large one overflows.
        size = system.g.abs().amax(-1, keepdim=True)
        size = torch.where((size > 0) & size.isfinite(), size, 1.0)
        system = dataclasses.replace(system, g=system.g / size)
        outcome, name = self._solve(system, max(self.rtol, 4 * torch.finfo(system.g.dtype).eps))
        outcome.u = outcome.u * size
        # What rounding leaves of the residual is not a failure to converge.
        rounded = (outcome.result == int(Result.MAX_STEPS)) & (outcome.residual <= FLOOR * system.eps)
        outcome.result = outcome.result.masked_fill(rounded, int(Result.CONVERGED))
        return outcome, name

    def _solve(self, system: System, rtol: float) -> tuple[LinearOutcome, str]:
        name = self.solver if self.solver != "auto" else "gmres" if system.metric is None else "cg"
        if name in SYMMETRIC and system.metric is None:
            raise ValueError(
                f"adjoint solver {name!r} needs a metric in which the Jacobian is self-adjoint and this f declares "
                "none; use Implicit(solver='gmres') or 'auto'"
            )
        if name == "gmres":
            return gmres(system, rtol, self.max_steps), name
        if name == "minres":
            return minres(system, rtol, self.max_steps), name
        if name != "cg":
            return _iterate(system, Picard() if name == "picard" else Anderson(), rtol, self.max_steps), name
        outcome = conjugate_gradient(system, rtol, self.max_steps)
        if self.solver == "cg":
            return outcome, name
        return self._rescue(system, rtol, outcome)

    def _rescue(self, system: System, rtol: float, outcome: LinearOutcome) -> tuple[LinearOutcome, str]:
        """Rows where CG met negative curvature by MINRES; by GMRES where rounding of f spoils the symmetry."""
        lost = outcome.result == int(Result.DIVERGED)
        if not bool(lost.any()):
            return outcome, "cg"
        outcome = _replaced(lost, minres(_only(lost, system), rtol, self.max_steps), outcome)
        lost = lost & (outcome.residual > max(rtol, FLOOR * system.eps))
        if not bool(lost.any()):
            return outcome, "cg+minres"
        start = pick(lost, outcome.u, torch.zeros_like(outcome.u))
        second = gmres(_only(lost, system), rtol, self.max_steps, start)
        return _replaced(lost, second, outcome), "cg+minres+gmres"


def _only(rows: Tensor, system: System) -> System:
    """The system of these rows; the others have no gradient, so that they are done at once."""
    return dataclasses.replace(system, g=pick(rows, system.g, torch.zeros_like(system.g)))


def _replaced(rows: Tensor, new: LinearOutcome, old: LinearOutcome) -> LinearOutcome:
    return LinearOutcome(
        pick(rows, new.u, old.u),
        torch.where(rows, new.result, old.result),
        torch.where(rows, new.residual, old.residual),
        old.steps + torch.where(rows, new.steps, 0),
    )


@dataclass(frozen=True)
class OneStep:
    """Jacobian-free: the gradient of one application of f at the equilibrium (Fung et al. 2022).

    Cheap, and far from exact where the map contracts slowly: 95 % error at contractions of .3 to .99.
    """

    drops_z0 = True

    def solve(self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool) -> Solved:
        outcome = _forward(self, f, z0, solver, stop, trace)
        state, read = attach(f, outcome.z, _one_step, AdjointReport(), exact=False)
        return Solved(state, outcome, None, read)


@dataclass(frozen=True)
class Neumann:
    """Recurrent backpropagation, cut off: u = sum of (J^T)^i g over i < terms (Neumann series).

    terms: 1 is `OneStep`. The error falls by the contraction rate with each term; what is left of the adjoint
    residual is reported, without a warning, since cutting off is what was asked for. 24 is what Goemaere et
    al. 2024 use for their deepest network.
    """

    terms: int = 24

    drops_z0 = True

    def __post_init__(self) -> None:
        check_count("terms", self.terms, 1)

    def solve(self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool) -> Solved:
        outcome = _forward(self, f, z0, solver, stop, trace)
        report = AdjointReport()
        state, read = attach(f, outcome.z, self._sum, report, exact=False)
        return Solved(state, outcome, report, read)

    def _sum(self, system: System) -> tuple[LinearOutcome, str]:
        return neumann(system, self.terms), f"neumann({self.terms})"


@dataclass(frozen=True)
class Phantom:
    """Phantom gradient: autograd through k more damped steps from the equilibrium (Geng et al. 2021).

    k: steps z <- (1 - damping) f(z) + damping z; memory grows with them. damping: 0 = none; torchdeq's tau is
    1 - damping. The value stays that of the equilibrium, which is what the residual is reported of.
    """

    k: int = 5
    damping: float = 0.5

    drops_z0 = True

    def __post_init__(self) -> None:
        check_count("k", self.k, 1)
        Picard(self.damping)

    def solve(self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool) -> Solved:
        outcome = _forward(self, f, z0, solver, stop, trace)
        if not torch.is_grad_enabled():
            return Solved(outcome.z, outcome)
        z = outcome.z.detach()
        for _ in range(self.k):
            fz = f(z)
            z = fz.lerp(z, self.damping) if self.damping else fz
        return Solved(gradient_of(z, outcome.z), outcome)


@dataclass(frozen=True)
class Unrolled:
    """Ordinary autograd through every iteration of the solver; memory grows with the steps.

    The one adjoint that keeps the gradient to z0. It differentiates the steps that were made, at least one: from
    a start that is nearly the equilibrium they are few and the gradient is as inexact as a `Phantom` one.
    """

    drops_z0 = False

    def solve(self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool) -> Solved:
        recording = torch.is_grad_enabled()
        outcome = run(f, z0, solver, stop, trace=trace, drop=not recording, least=int(recording))
        # An empty batch takes no step, yet what f depends on must get its (zero) gradient.
        return Solved(outcome.z if len(z0) else f(z0), outcome)


@dataclass(frozen=True)
class EqProp:
    """Equilibrium propagation (Scellier & Bengio 2017), symmetric: no backward pass through f, two solves instead.

    For functions whose energy has the gradient z - f(z) up to a factor, so that f can be nudged: metric the identity,
    as for `Retrieval` and `CHN`; others are refused. Gradients reach what the energy depends on.

    nudge: how far f is pushed, as a share of |z*|: the error falls with its square until rounding, which grows with its
        inverse, takes over. 1e-3 left an error of 7e-7 to 2e-4 in gradients of small CHNs and retrievals in float64, of
        2e-4 in those of a CHN in float32; with 1e-1 the nudged states are in other basins.
    rtol: of the residual of the nudged solves against the push. max_steps: of each.
    """

    nudge: float = 1e-3
    rtol: float = 1e-6
    max_steps: int = 1000

    drops_z0 = True

    def __post_init__(self) -> None:
        check_number("nudge", self.nudge, 0.0, 1.0, open_low=True)
        check_number("rtol", self.rtol, 0.0, 1.0, open_low=True)
        check_count("max_steps", self.max_steps, 1)

    def solve(self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool) -> Solved:
        with torch.no_grad():
            pushed = f.has_energy and f.metric(z0) is identity
        if not pushed:
            raise ValueError(
                "adjoint 'eqprop' needs an f with an energy whose gradient is z - f(z) up to a factor (has_energy, and "
                f"a metric that is the identity), and {type(f.f).__name__} has none; use 'implicit'"
            )
        outcome = _forward(self, f, z0, solver, stop, trace)
        report = AdjointReport()
        rtol = max(self.rtol * self.nudge, 4 * torch.finfo(z0.dtype).eps)
        nudge = Nudge(self.nudge, solver, Termination(rtol=rtol, atol=0.0, max_steps=self.max_steps))
        return Solved(attach_contrast(f, outcome.z, nudge, report), outcome, report)


ADJOINTS: dict[str, Callable[[], Adjoint]] = {
    "eqprop": EqProp,
    "implicit": Implicit,
    "neumann": Neumann,
    "onestep": OneStep,
    "phantom": Phantom,
    "unrolled": Unrolled,
}
SYMMETRIC = ("cg", "minres")
ADJOINT_SOLVERS = ("auto", *SYMMETRIC, "gmres", "picard", "anderson")


def make_adjoint(spec: str | Adjoint) -> Adjoint:
    """The adjoint for a name or an object."""
    if isinstance(spec, str):
        factory = ADJOINTS[spec] if spec in ADJOINTS else class_at("adjoint", spec)
        if factory is None:
            raise unknown("adjoint", spec, ADJOINTS)
        return cast(Adjoint, factory())
    if isinstance(spec, type) or not callable(getattr(spec, "solve", None)):
        raise TypeError(f"adjoint must be a name or an object such as Implicit(rtol=1e-6), got {spec!r}")
    return spec


def _forward(
    adjoint: Adjoint, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool
) -> Outcome:
    """The solve, without a graph."""
    if transformed():
        raise TypeError(f"{adjoint!r} does not work under torch.func; use Implicit(), Unrolled() or steps=k")
    with torch.no_grad():
        return run(f, z0, solver, stop, trace=trace)


def _one_step(system: System) -> tuple[LinearOutcome, str]:
    g = system.g
    zeros = torch.zeros(g.shape[0], dtype=torch.int64, device=g.device)
    return LinearOutcome(g, zeros, torch.zeros_like(g[:, 0]), zeros), "one step"


class _AdjointFunction(FlatFunction):
    """u -> g + V u as a function for the loop."""

    def __init__(self, system: System, g: Tensor) -> None:
        self._product = system.product
        self._g = g
        self.has_energy = self.autocast = False
        self.eps = torch.finfo(g.dtype).eps

    def __call__(self, flat: Tensor) -> Tensor:
        return self._g + self._product(flat)

    def narrow(self, live: Tensor) -> None:
        return None


def _iterate(system: System, solver: Solver, rtol: float, max_steps: int) -> LinearOutcome:
    """u = g + V u by the forward loop, on gradients of unit norm: rtol then is relative to |g|."""
    size = torch.linalg.vector_norm(system.g, dim=-1)
    unit = system.g / size.clamp_min(torch.finfo(size.dtype).tiny)[:, None]
    f = _AdjointFunction(system, unit)
    outcome = run(f, unit, solver, Termination(rtol=0.0, atol=rtol, max_steps=max_steps))
    residual = torch.linalg.vector_norm(f(outcome.z) - outcome.z, dim=-1)
    return LinearOutcome(outcome.z * size[:, None], outcome.result, residual, outcome.evaluations)
