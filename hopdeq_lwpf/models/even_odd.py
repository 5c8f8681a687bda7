"""The one-matrix form of a hierarchical memory, solved through its even-odd form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf._types import AdjointReport
from hopdeq_lwpf.models.hierarchical import HAMFunction
from hopdeq_lwpf.models.layered import HierarchicalContext
from hopdeq_lwpf.solvers import Implicit, Picard, Solver, Termination
from hopdeq_lwpf.solvers.adjoints import Solved
from hopdeq_lwpf.solvers.base import transformed
from hopdeq_lwpf.solvers.implicit import attach
from hopdeq_lwpf.solvers.loop import Outcome, run
from hopdeq_lwpf.solvers.registry import choose_solver, make_solver
from hopdeq_lwpf.solvers.view import FlatFunction, StateView


@dataclass(frozen=True)
class ThroughEvenOdd:
    """Solves the even layers alone, then sets the odd ones to what these make.

    Undamped steps of the one-matrix form are two processes that never meet (Goemaere et al. 2024, appendix E): the even
    layers of every second iterate are the iterates of the even-odd form from the even layers of the start. So where
    plain steps end in an equilibrium it is this one; where they end in a cycle of length 2, they have none. The
    tolerance carries over: odd layers have no residual, even ones the same, and |f| of all layers is larger.

    solver: of the even-odd form, a name or an object; "auto" chooses by what that form declares. Steps, evaluations and
    trace are those of that form; one more evaluation tells the residual of all layers. A function that is no undamped
    `HAMFunction` of the one-matrix form (under torch.func it is wrapped) is solved by plain steps.
    """

    solver: str | Solver = "auto"

    uses_energy = False
    uses_metric = False

    def run(self, f: FlatFunction, z0: Tensor, stop: Termination, trace: bool) -> Outcome:
        """Solve z = f(z) from z0 (B, n); see `hopdeq_lwpf.solvers.loop.run`."""
        ham = f.f
        if not isinstance(ham, HAMFunction) or not splits(ham):
            return run(f, z0, Picard(), stop, trace=trace)
        even, start = _even(f, z0)
        outcome = run(even, start, make_solver(self.solver) or choose_solver(even, start), stop, trace=trace)
        outcome.z = _all(f, even, outcome.z)
        image = f(outcome.z)
        size = torch.linalg.vector_norm(image, dim=-1).clamp_min(torch.finfo(image.dtype).tiny)
        outcome.residual = torch.linalg.vector_norm(image - outcome.z, dim=-1) / size
        outcome.evaluations = outcome.evaluations + 1
        return outcome


@dataclass(frozen=True)
class ImplicitEvenOdd(Implicit):
    """`Implicit` for the one-matrix form, with the odd layers eliminated: they are functions of the even ones.

    The adjoint system then is that of the even-odd form: less than half of the numbers, and half the products, since
    its Jacobian has the squares of the one-matrix form's eigenvalues. Any solver may have found the equilibrium.
    Where the function is no undamped `HAMFunction` of the one-matrix form this is `Implicit`.
    """

    def solve(self, f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, trace: bool) -> Solved:
        ham = f.f
        if transformed() or not isinstance(ham, HAMFunction) or not splits(ham):
            return super().solve(f, z0, solver, stop, trace)
        with torch.no_grad():
            outcome = run(f, z0, solver, stop, trace=trace)
        report = AdjointReport()
        if not torch.is_grad_enabled():
            return Solved(outcome.z, outcome, report)
        even, found = _even(f, outcome.z)
        state, read = attach(even, found, self.linear, report)
        layers = _all(f, even, state)
        # The gradient of these layers at the state that was found, to the last bit.
        return Solved((layers - layers.detach()) + outcome.z, outcome, report, read)


def _even(f: FlatFunction, z: Tensor) -> tuple[FlatFunction, Tensor]:
    """The even-odd form of f, and the even layers of z."""
    ham: HAMFunction = f.f  # type: ignore[assignment]
    context: HierarchicalContext = f.x
    half, start = ham.in_form(True), ham.even_layers(f.view.unflatten(z))
    view = StateView.of(half, start)
    even = FlatFunction(half, context._replace(start=start), view, f.device, reads=f.reads)
    return even, view.flatten(start)


def _all(f: FlatFunction, even: FlatFunction, z: Tensor) -> Tensor:
    """The state of f with these even layers, and the odd ones that they make."""
    half: HAMFunction = even.f  # type: ignore[assignment]
    states = dict(zip(half.graph.free, half.states(even.view.unflatten(z), even.x), strict=True))
    # Even layers first: whoever follows the graph by first inputs, as the logger of `Equilibrium`, gets to the solve.
    turns = (*half.graph.even, *half.graph.odd)
    widths = [half.graph.widths[i] for i in turns]
    parts = torch.cat([states[i] for i in turns], -1).split(widths, -1)
    placed = dict(zip(turns, parts, strict=True))
    return f.view.flatten(torch.cat([placed[i] for i in half.graph.free], -1))


def splits(f: HAMFunction) -> bool:
    """Whether this is a one-matrix form whose plain steps are those of an even-odd form, taken in turn."""
    return not (f.even_odd or f.damping or f.graph.same_parity)
