"""Our solvers in torchdeq's registry: `get_deq(f_solver="hopdeq_lbfgs", b_solver="hopdeq_anderson")`.

They are entered as soon as both torchdeq and `hopdeq_lwpf.solvers` have been imported, in either order, and
importing one never imports the other; `register_with_torchdeq()` enters them at once.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hopdeq_lwpf._types import Context, Result, State, unknown
from hopdeq_lwpf.solvers.allocator import settle
from hopdeq_lwpf.solvers.base import Deferred, Solver, take
from hopdeq_lwpf.solvers.loop import Outcome, run
from hopdeq_lwpf.solvers.registry import SOLVERS, choose_solver, make_solver
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.torchdeq import import_torchdeq
from hopdeq_lwpf.solvers.view import FlatFunction, StateView

OURS = "hopdeq_"
STOP_MODES = ("abs", "rel")


@dataclass(frozen=True)
class Bound:
    """f with its x filled in, z -> f(z, x): what torchdeq calls `func`.

    A plain function of z will do for any of our solvers. A Bound also lets them see what f declares: energy
    and metric, without which "hopdeq_lbfgs" guards its steps by the residual and "hopdeq_auto" cannot choose
    it, and `select`, by which problems that have stopped are dropped. The state is one tensor.
    """

    f: Callable[[State, Context], State]
    x: Context

    def __call__(self, z: Tensor) -> Tensor:
        return self.f(z, self.x)


def register_with_torchdeq() -> tuple[str, ...]:
    """Enter our solvers in torchdeq's registry and return their names there.

    They are "hopdeq_" and our name: picard, anderson, broyden, lbfgs, auto, and what `register_solver` was
    given. Calling it again is harmless and enters what has come since. Both cores, `ift`, `hook_ift`, phantom
    gradients and `n_states` work; options go through `solver_kwargs` and are those of the solver's class, an
    unknown one is an error. See `solve_for_torchdeq` for what they return.

    Raises ImportError without torchdeq; ValueError if a name is taken by something else.
    """
    return _enter(import_torchdeq().solver)


def _enter(registry: Any) -> tuple[str, ...]:
    names = tuple(f"{OURS}{name}" for name in (*SOLVERS, "auto"))
    for name in names:
        before = registry._solvers.get(name)
        if before is None:
            solver = functools.partial(solve_for_torchdeq, name.removeprefix(OURS))
            registry.register_solver(name, solver)
        elif getattr(before, "func", None) is not solve_for_torchdeq:
            raise ValueError(f"torchdeq already has another solver {name!r}")
    return names


def solve_for_torchdeq(
    name: str,
    func: Callable[[Any], Any],
    x0: State,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    **options: object,
) -> tuple[State, list[State], Any]:
    """Our solver `name` behind torchdeq's solver interface: (state, trajectory, SolverStat).

    max_iter: updates; one evaluation more tells the residual of what is returned. tol, stop_mode: each problem
    stops by itself once |f(z) - z| <= tol ("abs") or <= tol |f(z)| ("rel"); "abs" is torchdeq's default, with
    which the error of a gradient depends on the scale of the loss. indexing: steps whose best iterate so far
    is returned in the trajectory, always one for each. options: fields of the solver's class.

    The statistics are of evaluated states only: `abs_trace`, `rel_trace` (B, max_iter + 1) begin at x0 and are
    filled up with the lowest after a problem has stopped; `abs_lowest`, `rel_lowest` are those of the state
    returned and `nstep` (float, as torchdeq's) its step. Added are `result` (`Result` codes, int64) and
    `evaluations` (int64). Nothing is differentiated: torchdeq attaches the gradient. A second derivative
    through torchdeq's implicit gradient is wrong without notice; here it raises RuntimeError.
    """
    steps = _check_call(max_iter, tol, stop_mode)
    _refuse_second_derivative()
    chosen = _with_options(name, options)
    settle()
    with torch.no_grad():
        f, z0 = _flat(func, x0)
        wanted = sorted({int(step) for step in indexing or ()})
        record = _Record(z0, wanted)
        stop = Termination(
            rtol=tol if stop_mode == "rel" else 0.0,
            # z = 0 is an equilibrium of retrieval with forgetting, where a relative test alone never passes.
            atol=tol if stop_mode == "abs" else 1e-9 * tol,
            max_steps=steps,
            check_every=1,
        )
        outcome = run(_Recorded(f, record), z0, chosen or choose_solver(f, z0), stop)
        trajectory = [f.view.unflatten(record.state(step, outcome)) for step in indexing or ()]
        return f.view.unflatten(outcome.z), trajectory, record.statistics(outcome, steps, f.view.batch_shape)


def _check_call(max_iter: object, tol: object, stop_mode: object) -> int:
    """max_iter as an int, after a look at all three."""
    if stop_mode not in STOP_MODES:
        raise unknown("stop_mode", stop_mode, STOP_MODES)
    if not isinstance(tol, (int, float)) or not (math.isfinite(tol) and tol >= 0):
        raise ValueError(f"tol must be a finite number >= 0, got {tol!r}")
    # torchdeq hands on a float where the user gave one.
    if not isinstance(max_iter, (int, float)) or max_iter < 1 or int(max_iter) != max_iter:
        raise ValueError(
            f"max_iter must be a whole number >= 1, got {max_iter!r}; with n_states, torchdeq divides f_max_iter "
            "by it"
        )
    return int(max_iter)


def _refuse_second_derivative() -> None:
    """Raise within a backward pass that is recorded: its gradient would be a constant to the next one."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    if task is not None and torch.is_grad_enabled() and task() != -1:
        raise RuntimeError(
            "torchdeq's implicit gradient cannot be differentiated again: it would be a constant and the second "
            "derivative wrong. Use hopdeq_lwpf's Equilibrium or torchdeq's phantom gradient (ift=False)"
        )


def _with_options(name: str, options: dict[str, object]) -> Solver | None:
    """Our solver with these fields; None for "auto"."""
    plain = make_solver(name)
    known = [field.name for field in dataclasses.fields(plain)] if plain is not None else []  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise TypeError(str(unknown(f"option of {OURS}{name}", option, known)))
    return dataclasses.replace(plain, **options) if options else plain  # type: ignore[type-var]


def _flat(func: Callable[[Any], Any], x0: State) -> tuple[FlatFunction, Tensor]:
    """func over flat states, and x0 as one."""
    inner = _bound(func)
    if inner is not None:
        f, x = inner.f, inner.x
    else:
        f, x = _OfState(func, x0), None
    view = StateView.of(f, x0)
    flat = view.flatten(x0)
    return FlatFunction(f, x, view, flat.device.type), flat


def _bound(func: Any) -> Bound | None:
    """The Bound that torchdeq wrapped, if it is one."""
    from torchdeq.utils.layer_utils import DEQWrapper

    inner = func.func if type(func) is DEQWrapper else func
    return inner if isinstance(inner, Bound) else None


class _OfState:
    """func(z) as f(z, x)."""

    def __init__(self, func: Callable[[Any], Any], x0: State) -> None:
        self.func = func
        # torchdeq takes a list of states where it keeps no statistics; func may then return a tuple.
        self.many = None if isinstance(x0, Tensor) else type(x0)
        # A number alone is one problem.
        self.state_ndim = None if self.many or x0.ndim else 0

    def __call__(self, z: State, x: None) -> State:
        fz = self.func(z)
        return fz if self.many is None else self.many(fz)


class _Record:
    """The residual of every evaluation, and the best iterate up to the steps that are wanted."""

    def __init__(self, z0: Tensor, wanted: list[int]) -> None:
        self.absolute: list[Tensor] = []
        self.relative: list[Tensor] = []
        self.wanted = wanted
        self.best_z = z0
        self.best = torch.full_like(z0[:, 0] if z0.shape[1] else z0.sum(1), float("inf"))
        self.kept: dict[int, Tensor] = {}

    def add(self, z: Tensor, fz: Tensor, rows: Tensor | None) -> None:
        """One evaluation; `rows` are the problems it was made for (None: all)."""
        absolute = torch.linalg.vector_norm(fz - z, dim=-1)
        relative = absolute / torch.linalg.vector_norm(fz, dim=-1).clamp_min(torch.finfo(fz.dtype).tiny)
        step = len(self.relative)
        if rows is not None:
            absolute, relative = (self._spread(value, rows) for value in (absolute, relative))
        self.absolute.append(absolute)
        self.relative.append(relative)
        if self.wanted and step <= self.wanted[-1]:
            if rows is not None:
                z = self.best_z.index_copy(0, rows, z)
            better = relative < self.best
            self.best = torch.where(better, relative, self.best)
            self.best_z = torch.where(better[:, None], z, self.best_z)
            self.kept[step] = self.best_z
            if step - 1 not in self.wanted:
                self.kept.pop(step - 1, None)

    def _spread(self, value: Tensor, rows: Tensor) -> Tensor:
        return torch.full_like(self.best, float("nan")).index_copy(0, rows, value)

    def state(self, step: int, outcome: Outcome) -> Tensor:
        """The best iterate (B, n) up to `step`; what was returned, for problems that had stopped by then."""
        kept = self.kept.get(step, outcome.z)
        return torch.where((outcome.steps <= step)[:, None], outcome.z, kept)

    def statistics(self, outcome: Outcome, steps: int, batch: torch.Size) -> Any:
        """torchdeq's SolverStat."""
        from torchdeq.solver.stat import SolverStat

        none = self.best.new_empty(len(self.best), 0)
        absolute = torch.stack(self.absolute, 1) if self.absolute else none
        relative = torch.stack(self.relative, 1) if self.relative else none
        time = torch.arange(relative.shape[1], device=relative.device)
        after = time > outcome.steps[:, None]
        lowest = relative.nan_to_num(float("inf"), float("inf")).masked_fill(after, float("inf"))
        at = outcome.steps
        if relative.shape[1]:
            at = torch.where(outcome.result == int(Result.CONVERGED), at, lowest.argmin(1))
        traces = {}
        for name, trace in (("abs", absolute), ("rel", relative)):
            best = trace.gather(1, at[:, None]) if trace.shape[1] else trace.new_empty(len(trace), 1)
            filled = torch.where(after, best, trace)
            rest = best.expand(-1, steps + 1 - trace.shape[1])
            traces[f"{name}_trace"] = torch.cat([filled, rest], 1).reshape(*batch, steps + 1)
            traces[f"{name}_lowest"] = best.reshape(batch)
        return SolverStat(
            **traces,
            nstep=at.to(self.best.dtype).reshape(batch),
            result=outcome.result.reshape(batch),
            evaluations=outcome.evaluations.reshape(batch),
        )


class _Recorded(FlatFunction):
    """A flat function that enters each evaluation in the record."""

    def __init__(self, inner: FlatFunction, record: _Record, rows: Tensor | None = None) -> None:
        self.inner, self.record, self.rows = inner, record, rows
        self.view, self.has_energy, self.eps = inner.view, inner.has_energy, inner.eps
        self.autocast, self.device = inner.autocast, inner.device

    def __call__(self, flat: Tensor) -> Tensor:
        fz = self.inner(flat)
        self.record.add(flat, fz, self.rows)
        return fz

    def evaluate(self, flat: Tensor) -> tuple[Tensor, Deferred, Tensor | None]:
        found = self.inner.evaluate(flat)
        self.record.add(flat, found[0], self.rows)
        return found

    def metric(self, flat: Tensor) -> Callable[[Tensor], Tensor] | None:
        return self.inner.metric(flat)

    def narrow(self, live: Tensor) -> tuple[FlatFunction, Tensor] | None:
        narrowed = self.inner.narrow(live)
        if narrowed is None:
            return None
        inner, keep = narrowed
        rows = keep if self.rows is None else take(self.rows, keep)
        return _Recorded(inner, self.record, rows), keep


class _OnImport(importlib.abc.MetaPathFinder):
    """Enters our solvers once torchdeq.solver has been executed; finds nothing itself."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "torchdeq.solver":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_enter(module: Any) -> None:
            execute(module)
            _enter(module)

        spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec


def enter_when_imported() -> None:
    """Enter our solvers now if torchdeq has been imported, else when it will be."""
    registry = sys.modules.get("torchdeq.solver")
    if registry is not None:
        _enter(registry)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())


enter_when_imported()
