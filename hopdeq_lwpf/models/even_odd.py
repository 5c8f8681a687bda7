"""The one-matrix form of a hierarchical memory, solved through its even-odd form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf.models.hierarchical import HAMFunction
from hopdeq_lwpf.models.layered import HierarchicalContext
from hopdeq_lwpf.solvers import Picard, Solver, Termination
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
        context: HierarchicalContext = f.x
        start = ham.even_layers(f.view.unflatten(z0))  # type: ignore[arg-type]
        half = ham.in_form(True)
        even = FlatFunction(half, context._replace(start=start), StateView.of(half, start), f.device)
        flat = even.view.flatten(start)
        outcome = run(even, flat, make_solver(self.solver) or choose_solver(even, flat), stop, trace=trace)
        states = half.states(even.view.unflatten(outcome.z), even.x)  # type: ignore[arg-type]
        outcome.z = f.view.flatten(torch.cat(states, -1))
        image = f(outcome.z)
        size = torch.linalg.vector_norm(image, dim=-1).clamp_min(torch.finfo(image.dtype).tiny)
        outcome.residual = torch.linalg.vector_norm(image - outcome.z, dim=-1) / size
        outcome.evaluations = outcome.evaluations + 1
        return outcome


def splits(f: HAMFunction) -> bool:
    """Whether this is a one-matrix form whose plain steps are those of an even-odd form, taken in turn."""
    return not (f.even_odd or f.damping or f.graph.same_parity)
