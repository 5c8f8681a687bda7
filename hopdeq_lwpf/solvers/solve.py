"""fixed_point(): the one call that solves z = f(z, x)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hopdeq_lwpf._types import Context, Result, Solution, State, Trace
from hopdeq_lwpf.solvers.adjoints import Adjoint, make_adjoint
from hopdeq_lwpf.solvers.allocator import settle
from hopdeq_lwpf.solvers.base import Solver, outside_of_compile
from hopdeq_lwpf.solvers.registry import choose_solver, make_solver
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.view import FlatFunction, StateView


def fixed_point(  # noqa: PLR0913 (one call, every switch)
    f: Callable[[State, Context], State],
    x: Context,
    z0: State,
    *,
    steps: int | None = None,
    solver: str | Solver = "auto",
    stop: Termination = Termination(),  # noqa: B008 (frozen)
    adjoint: str | Adjoint = "implicit",
    trace: bool = False,
    read_out: bool = False,
) -> Solution:
    """Solve z = f(z, x) from z0, or apply f a fixed number of times.

    f: see `FixedPointFunction`; any callable will do. x: whatever stays fixed, handed through.
    z0: a tensor or pytree of tensors, (*batch, *state); the trailing `f.state_ndim` dimensions are one problem
        (default: all but the first dimension of the tensor).
    steps: k applies f exactly k times with ordinary autograd; solver and adjoint are then not used and z0 may
        require grad; `result` says whether the last step met the tolerance. None solves to equilibrium.
    solver: "auto", "picard", "anderson", "broyden", "lbfgs", "torchdeq:NAME", or an object with options.
    adjoint: "implicit", "unrolled", "onestep", "neumann", "phantom", or an object with options.
    trace: record residual and energy of every evaluation (and evaluate energies where the solver would not).
    read_out: `value` is what f.step(z, x) -> (f, read-out) reads out, at the equilibrium or in the k-th application;
        with the implicit adjoint this costs neither an evaluation nor memory. Not to be changed in place, since it is
        what the backward pass needs. Else `value` is the state.

    Failure to converge is reported in the Solution and never raised here; an unconverged problem returns its
    iterate of lowest residual. Raises TypeError or ValueError for input that cannot be solved.
    """
    if steps is None and torch.compiler.is_compiling():
        options = {"solver": solver, "stop": stop, "adjoint": adjoint, "trace": trace, "read_out": read_out}
        return outside_of_compile(fixed_point, f, x, z0, **options)
    check_function(f)
    check_steps(steps)
    check_stop(stop)
    chosen, gradient = make_solver(solver), make_adjoint(adjoint)
    view = StateView.of(f, z0)
    flat = view.flatten(z0)
    if not torch.compiler.is_compiling():
        settle()
    function = FlatFunction(f, x, view, flat.device.type, reads=read_out)
    if steps is not None:
        return _apply(function, flat, steps, stop, trace)
    if gradient.drops_z0 and flat.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"z0 requires grad, but at an equilibrium the gradient to the starting state is zero and the adjoint "
            f"{gradient!r} drops it. Pass z0.detach(); or let the query enter every step (inject='input'); or use "
            "steps=k or adjoint='unrolled'."
        )
    if not view.problems:
        chosen = chosen or make_solver("picard")
    with torch.no_grad():
        chosen = chosen or choose_solver(function, flat)
    solved = gradient.solve(function, flat, chosen, stop, trace)
    state, outcome, shape = view.unflatten(solved.state), solved.outcome, view.batch_shape
    value = state if not read_out else function.step(solved.state)[1] if solved.read is None else solved.read
    return Solution(
        value=value,
        state=state,
        result=outcome.result.reshape(shape),
        residual=outcome.residual.reshape(shape),
        steps=outcome.steps.reshape(shape),
        evaluations=outcome.evaluations.reshape(shape),
        trace=outcome.trace,
        adjoint=solved.report,
    )


def check_steps(steps: object) -> None:
    """Raise unless steps is None or an integer >= 1."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be None (solve to equilibrium) or an integer >= 1, got {steps!r}")


def check_function(f: object) -> None:
    """Raise unless f can be called."""
    if not callable(f):
        raise TypeError(f"f must be a function of (z, x), got {f!r}")


def check_stop(stop: object) -> None:
    """Raise unless stop is a Termination."""
    if not isinstance(stop, Termination):
        raise TypeError(f"stop must be a Termination, got {stop!r}")


def judge_step(before: Tensor, after: Tensor, stop: Termination) -> tuple[Tensor, Tensor]:
    """Result codes and relative residual of one step before -> after, (B, n) each."""
    with torch.no_grad():
        size = torch.linalg.vector_norm(after, dim=-1)
        distance = torch.linalg.vector_norm(after - before, dim=-1)
        done = (distance <= stop.rtol * size + stop.atol) & distance.isfinite()
        result = torch.where(done, int(Result.CONVERGED), int(Result.MAX_STEPS))
        result = torch.where(distance.isfinite(), result, int(Result.NONFINITE))
        return result, distance / size.clamp_min(torch.finfo(size.dtype).tiny)


def _apply(f: FlatFunction, z: Tensor, steps: int, stop: Termination, trace: bool) -> Solution:
    """Exactly `steps` applications of f."""
    residuals, energies = [], []
    before, shape, read = z, f.view.batch_shape, None
    for left in range(steps, 0, -1):
        before = z
        z, read = f.step(before) if f.reads and left == 1 else (f(before), None)
        if trace:
            residuals.append(judge_step(before, z, stop)[1].reshape(shape))
            if f.has_energy:
                with torch.no_grad():
                    energies.append(f.evaluate(before)[1]().reshape(shape))
    result, residual = judge_step(before, z, stop)
    state = f.view.unflatten(z)
    count = torch.full_like(result, steps).reshape(shape)
    return Solution(
        value=state if read is None else read,
        state=state,
        result=result.reshape(shape),
        residual=residual.reshape(shape),
        steps=count,
        evaluations=count.clone(),
        trace=Trace(torch.stack(residuals), torch.stack(energies) if energies else None) if trace else None,
    )
