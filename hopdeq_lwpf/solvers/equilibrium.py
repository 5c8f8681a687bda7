"""A fixed-point function as a layer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hopdeq_lwpf._types import Context, ConvergenceWarning, Solution, State, plain, unknown
from hopdeq_lwpf.solvers.adjoints import Adjoint, make_adjoint
from hopdeq_lwpf.solvers.base import Solver, outside_of_compile
from hopdeq_lwpf.solvers.registry import make_solver
from hopdeq_lwpf.solvers.solve import check_function, check_steps, check_stop, fixed_point
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.warm import WarmStart
from hopdeq_lwpf.solvers.weights import frozen_weights, has_moving_weights

ON_FAILURE = ("warn", "raise", "ignore")
DETACHED = "z0 was detached: at an equilibrium the gradient to the starting state is zero"


class Equilibrium(nn.Module):
    """The equilibrium of f as a module: forward(x) -> z with z = f(z, x).

    The context is `f.prepare(x)` where f has `prepare`, else x; the start is `f.init(context)` where f has
    `init`, else zeros like x. `steps`, `solver`, `stop` and `adjoint` are those of `fixed_point`.

    on_failure: "warn", "raise" or "ignore" when problems do not converge (steps=k never fails).
    warm_start: True starts each sample at its last equilibrium, where forward gets `index`, the numbers of the
        samples (see `WarmStart`, which is kept as `warm`, outside of the state_dict).
    `last_solution` holds the detached Solution of the last call, for a look at residual and steps.
    """

    last_solution: Solution | None

    def __init__(
        self,
        f: Callable[[State, Context], State],
        *,
        steps: int | None = None,
        solver: str | Solver = "auto",
        stop: Termination = Termination(),  # noqa: B008 (frozen)
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        check_function(f)
        check_steps(steps)
        check_stop(stop)
        make_solver(solver)
        make_adjoint(adjoint)
        if on_failure not in ON_FAILURE:
            raise unknown("on_failure", on_failure, ON_FAILURE)
        self.f = f
        self.steps = steps
        self.solver = solver
        self.stop = stop
        self.adjoint = adjoint
        self.on_failure = on_failure
        if warm_start and steps is not None:
            raise ValueError(f"warm_start needs an equilibrium to start at; with steps={steps} there is none")
        if warm_start and not make_adjoint(adjoint).drops_z0:
            raise ValueError(
                f"warm_start leaves {adjoint!r} next to no steps to differentiate; use adjoint='implicit'"
            )
        self.warm = WarmStart() if warm_start else None
        self.last_solution = None
        self._told = False

    def forward(
        self,
        x: Any,
        z0: State | None = None,
        *,
        index: Tensor | None = None,
        read_out: bool = False,
        return_solution: bool = False,
    ) -> State | Solution:
        """x -> the equilibrium (a tensor or pytree shaped as z0), or the whole Solution.

        read_out: what f reads out there instead (see `fixed_point`); `last_solution.value` is the state all the same.
        index: (B,) integers, which samples these are; for warm starts only.
        """
        if self.steps is None and torch.compiler.is_compiling():
            options = {"index": index, "read_out": read_out, "return_solution": return_solution}
            return outside_of_compile(self.forward, x, z0, **options)
        # A solve needs a fixed map; what stays the same anyway is left as it is, for its second derivatives.
        with frozen_weights(self) if has_moving_weights(self) else nullcontext():
            solution = self._solve(x, z0, index, read_out)
        self.last_solution = dataclasses.replace(
            solution,
            # Read-outs are computed again where someone asks: weights are too large to keep until the next call.
            value=pytree.tree_map(_detached, solution.state if read_out else solution.value),
            state=pytree.tree_map(_detached, solution.state),
            result=plain(solution.result),
            residual=plain(solution.residual),
            steps=plain(solution.steps),
            evaluations=plain(solution.evaluations),
        )
        if index is not None and self.warm is not None:
            self.warm.keep(index, solution)
        self._report(solution)
        return solution if return_solution else solution.value

    def _solve(self, x: Any, z0: State | None, index: Tensor | None, read_out: bool) -> Solution:
        context = self.f.prepare(x) if hasattr(self.f, "prepare") else x
        z0, note = self._detach(self._start(x, context) if z0 is None else z0)
        if index is not None:
            if self.warm is None:
                raise ValueError("index is for warm starts: build the layer with warm_start=True")
            z0 = self.warm.start(index, z0)
        solution = fixed_point(
            self.f,
            context,
            z0,
            steps=self.steps,
            solver=self.solver,
            stop=self.stop,
            adjoint=self.adjoint,
            read_out=read_out,
        )
        return dataclasses.replace(solution, note=note)

    def _start(self, x: Any, context: Context) -> State:
        if hasattr(self.f, "init"):
            return self.f.init(context)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"z0 is needed: f has no init(context) and x is a {type(x).__name__}, not a tensor"
            )
        return torch.zeros_like(x)

    def _detach(self, z0: State) -> tuple[State, str]:
        """z0 without gradient where the adjoint would drop it; says so once, and in every Solution."""
        drops = self.steps is None and make_adjoint(self.adjoint).drops_z0 and torch.is_grad_enabled()
        if not drops or not any(leaf.requires_grad for leaf in pytree.tree_leaves(z0)):
            return z0, ""
        # Where the query enters every step as well, nothing is lost.
        if not self._told and getattr(self.f, "inject", None) != "input":
            self._told = True
            warnings.warn(
                f"{DETACHED}. Use inject='input', steps=k or adjoint='unrolled' to train what makes z0.",
                UserWarning,
                stacklevel=3,
            )
        return pytree.tree_map(Tensor.detach, z0), DETACHED

    def _report(self, solution: Solution) -> None:
        if self.steps is not None or self.on_failure == "ignore":
            return
        message = solution.failure()
        if message is None:
            return
        if self.on_failure == "raise":
            solution.require()
        warnings.warn(message, ConvergenceWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_solution": None}

    def extra_repr(self) -> str:
        return f"steps={self.steps}, solver={self.solver!r}, adjoint={self.adjoint!r}, on_failure={self.on_failure!r}"


def _detached(tensor: Tensor) -> Tensor:
    return plain(tensor.detach())
