"""A fixed-point function as a layer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

from hopdeq_lwpf._types import (
    Context,
    ConvergenceWarning,
    Result,
    Solution,
    State,
    plain,
    unknown,
)
from hopdeq_lwpf.solvers.adjoints import Adjoint, make_adjoint
from hopdeq_lwpf.solvers.base import Solver, outside_of_compile
from hopdeq_lwpf.solvers.registry import make_solver
from hopdeq_lwpf.solvers.solve import check_function, check_steps, check_stop, fixed_point
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.warm import WarmStart
from hopdeq_lwpf.solvers.weights import frozen_weights, has_moving_weights

ON_FAILURE = ("warn", "raise", "ignore")
DETACHED = "z0 was detached: at an equilibrium the gradient to the starting state is zero"
Logger: TypeAlias = Callable[[str, Tensor], object]


class Equilibrium(nn.Module):
    """The equilibrium of f as a module: forward(x) -> z with z = f(z, x).

    The context is `f.prepare(x)` where f has `prepare`, else x; the start is `f.init(context)` where f has
    `init`, else zeros like x. `steps`, `solver`, `stop` and `adjoint` are those of `fixed_point`.

    on_failure: "warn", "raise" or "ignore" when problems do not converge (steps=k never fails).
    warm_start: True starts each sample at its last equilibrium, where forward gets `index`, the numbers of the
        samples (see `WarmStart`, which is kept as `warm`, outside of the state_dict).
    logger: a function of (name, value), such as `self.log` of a LightningModule, also to be set later as
        `layer.logger = ...`. After each forward pass it gets residual_forward (mean relative residual of the problems,
        of those that are finite), steps_forward (mean) and converged_forward (share with result CONVERGED); after each
        backward solve that has an `AdjointReport` the same with _backward. Values are 0-d tensors on the device of the
        solve, so that nothing waits for it; an empty batch logs nothing. None, the default, costs nothing. It is not
        copied: of a copy or a pickle of the layer, `to_even_odd()` included, the logger is None.
    `last_solution` holds the detached Solution of the last call, for a look at residual and steps.
    """

    last_solution: Solution | None
    logger: Logger | None = None

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
        logger: Logger | None = None,
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
        self.logger = logger
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
            # Not that of a subclass, which may take other arguments.
            return outside_of_compile(Equilibrium.forward, self, x, z0, **options)
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
        if self.logger is not None:
            _log(self.logger, "forward", solution.result, solution.residual, solution.steps)
            _log_backward(self.logger, solution)
        self._report(solution)
        return solution if return_solution else solution.value

    def problem(self, x: Any, z0: State | None = None) -> tuple[Context, State]:
        """What a call with x solves: the context of f and the start, `fixed_point(layer.f, *layer.problem(x))`."""
        context = self.f.prepare(x) if hasattr(self.f, "prepare") else x
        return context, self._start(x, context) if z0 is None else z0

    def _solve(self, x: Any, z0: State | None, index: Tensor | None, read_out: bool) -> Solution:
        context, z0 = self.problem(x, z0)
        z0, note = self._detach(z0)
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

    def __setattr__(self, name: str, value: Any) -> None:
        # Not a property: a module would become a submodule without ever reaching it, and its parent its child.
        if name == "logger" and value is not None and (isinstance(value, nn.Module) or not callable(value)):
            raise TypeError(
                f"logger must be None or a function of (name, value), such as self.log of a LightningModule, got a "
                f"{type(value).__name__}"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A logger is mostly a method of what the layer is part of: copying or pickling it would take that along.
        return {**self.__dict__, "last_solution": None, "logger": None}

    def extra_repr(self) -> str:
        return f"steps={self.steps}, solver={self.solver!r}, adjoint={self.adjoint!r}, on_failure={self.on_failure!r}"


def _detached(tensor: Tensor) -> Tensor:
    return plain(tensor.detach())


def _log(logger: Logger, which: str, result: Tensor, residual: Tensor, steps: Tensor) -> None:
    """Hand means over the problems of one solve to the logger."""
    result, residual, steps = plain(result), plain(residual), plain(steps)
    if not result.numel():
        return
    finite = residual.isfinite()
    logger(f"residual_{which}", residual.where(finite, 0.0).sum() / finite.sum())
    logger(f"steps_{which}", steps.to(residual.dtype).mean())
    logger(f"converged_{which}", (result == Result.CONVERGED).to(residual.dtype).mean())


# What a logger does with its values is not for torch.compile to trace (see `outside_of_compile`).
_log._torchdynamo_disable = True  # type: ignore[attr-defined]


def _log_backward(logger: Logger, solution: Solution) -> None:
    """Log each backward solve of this solution when it is done."""
    report = solution.adjoint
    if report is None:
        return
    node = next((leaf.grad_fn for leaf in pytree.tree_leaves(solution.state)), None)
    # Between the state and the function that solves the adjoint lie views and casts only.
    while node is not None and not isinstance(node, BackwardCFunction):
        node = node.next_functions[0][0]
    if node is None:
        return

    def log(_: Any, incoming: tuple[Tensor | None, ...]) -> None:
        filled = [part for part in (report.result, report.residual, report.steps) if part is not None]
        if filled and any(gradient is not None for gradient in incoming):
            _log(logger, "backward", *filled)

    node.register_hook(log)
