"""What a fixed-point function is and what a solve returns."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import torch
from torch import Tensor

# A tensor, or dicts, lists and tuples of tensors (torch's pytree).
State: TypeAlias = Any
Context: TypeAlias = Any


class Result(IntEnum):
    """How the solve of one problem ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGED = 2
    NONFINITE = 3


ADVICE = {
    Result.MAX_STEPS: "raise max_steps, loosen rtol, lower beta, or damp the solver",
    Result.DIVERGED: "the map expands: damp the solver, lower beta, or normalise the weights of f",
    Result.NONFINITE: "f returned NaN or inf: look for it in the query, the patterns and the parameters",
}


class ConvergenceError(RuntimeError):
    """Raised by `Solution.require()` and by `on_failure="raise"`."""


class ConvergenceWarning(UserWarning):
    """A forward or adjoint solve left problems unconverged."""


@runtime_checkable
class FixedPointFunction(Protocol):
    """f(z, x), whose equilibrium z = f(z, x) is sought. Any callable will do; the rest is optional.

    `state_ndim`: how many trailing dimensions form one problem (retrieval 1; default: all but dim 0).
    `has_energy`: whether plain iteration is guaranteed to lower `energy`.
    `energy(z, x)`: one value a problem, shape `z.shape[:-state_ndim]`.
    `evaluate(z, x)`: (f, energy, piece) at the price of one, called where it is there. energy: a tensor, or a
    function that makes it from what f computed, since solvers ask for few of them. Between two states of
    different piece, one number a problem, f has a kink (forgetting: which patterns are kept); None: smooth.
    `step(z, x)`: (f, read-out), where another tensor than the state is read out, at the price of f.
    `metric(z, x)`: applies a symmetric positive definite M(z) for which M df/dz is self-adjoint; None: not known.
    `trusted(z, x)`: of an f that stands for another only near some states: bool, one a problem. A solve of a problem
    ends, unconverged, at the first tested state at which it does not hold, and returns one at which it did.
    `inject`: "input" says that the query enters every step, so that z0 may be detached without loss.
    `select(x, live)`: x for a subset of the problems that includes the live ones, and the rows that were
    kept; solvers drop finished problems only where it is there, since nothing else says which tensors of x
    belong to one problem.
    """

    def __call__(self, z: State, x: Context, /) -> State: ...


@dataclass(frozen=True)
class Trace:
    """The course of a solve: entry t belongs to the t-th evaluation, NaN once a problem has stopped."""

    residual: Tensor  # (T, *batch): |f(z) - z| / |f(z)|
    energy: Tensor | None  # (T, *batch), where f has an energy


@dataclass
class AdjointReport:
    """How the last backward pass through a solution went; empty until there was one."""

    result: Tensor | None = None  # (*batch) int64, Result codes
    residual: Tensor | None = None  # (*batch): |g + J^T u - u| / |g|
    steps: Tensor | None = None  # (*batch) int64: vector-Jacobian products that a problem took part in
    method: str = ""


@dataclass(frozen=True)
class Solution:
    """One entry a problem in every field; `value` carries the gradient.

    value: the read-out, or the state where there is none. state: z at the end. result: `Result` codes, int64.
    residual: |f(z) - z| / |f(z)| of the returned state, in float32 or wider. steps: updates made;
    evaluations: calls of f that the problem took part in. `trace` is None unless it was asked for;
    `adjoint` is filled by the backward pass; `note` says what was done to the input, if anything.
    """

    value: State
    state: State
    result: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: Tensor
    trace: Trace | None = None
    adjoint: AdjointReport | None = None
    note: str = ""

    @property
    def converged(self) -> Tensor:
        """(*batch) bool."""
        return self.result == Result.CONVERGED

    def failure(self) -> str | None:
        """What went wrong, in one sentence with what to try; None if every problem converged."""
        result, residual = plain(self.result), plain(self.residual)
        failed = result != Result.CONVERGED
        count = int(failed.sum())
        if not count:
            return None
        codes = sorted({int(code) for code in result[failed]})
        finite = residual[failed]
        worst = float(finite[~finite.isnan()].max()) if bool((~finite.isnan()).any()) else float("nan")
        names = ", ".join(Result(code).name for code in codes)
        advice = "; ".join(ADVICE[Result(code)] for code in codes)
        return (
            f"{count} of {failed.numel()} problems did not converge ({names}); worst residual {worst:.1e}. "
            f"What to try: {advice}."
        )

    def require(self) -> Self:
        """Return self, or raise `ConvergenceError` saying how many failed, how badly and what to try."""
        message = self.failure()
        if message is not None:
            raise ConvergenceError(message)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all fields to a safetensors file; `hopdeq_lwpf.storage.load_solution` reads it.

        See `hopdeq_lwpf.storage.save_solution`.
        """
        # By name: storage lies above, and is needed only here.
        importlib.import_module("hopdeq_lwpf.storage").save_solution(self, path)


def unknown(kind: str, name: object, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not known: names the nearest one and all that are allowed."""
    names = sorted(allowed)
    lowered = {other.lower(): other for other in names}
    near = [lowered[match] for match in difflib.get_close_matches(str(name).lower(), list(lowered), n=1)]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{kind} {name!r} is not one of {names}.{hint}")


def resolve(argument: str, spec: object, named: Mapping[str, Any], kind: type, *, none: bool = False) -> Any:
    """`spec` if it is a `kind`, what `named` has under it if it is a name; otherwise an error that helps.

    Raises ValueError for a name that is not known, TypeError for anything else; `none` says that None, which
    the caller sees to, would have been allowed too.
    """
    if isinstance(spec, kind):
        return spec
    if isinstance(spec, str):
        if spec not in named:
            raise unknown(argument, spec, named)
        return named[spec]
    hint = f"; did you mean {spec.__name__}(...)?" if isinstance(spec, type) else ""
    also = "None, " if none else ""
    raise TypeError(f"{argument} must be {also}a name or a {kind.__name__} object, got {spec!r}{hint}")


def check_float_tensor(name: str, value: object) -> Tensor:
    """`value` as it came if it is a floating-point tensor; otherwise an error that names the argument."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor({name})"
        )
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}; use {name}.float()")
    return value


def check_same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors share dtype and device."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {value.dtype} but {other_name} has {other.dtype}; convert one with .to()"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name} is on {value.device} but {other_name} is on {other.device}; move one with .to()"
        )


Matvec: TypeAlias = Callable[[Tensor], Tensor]
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def identity(v: Tensor) -> Tensor:
    """The metric of a function whose Jacobian is symmetric; solvers know it by this object, so return it itself."""
    return v


def plain(tensor: Tensor) -> Tensor:
    """The tensor under all transforms of torch.func, with the vmapped dimensions in it; as it is outside."""
    if torch.compiler.is_compiling():
        return tensor
    functorch = torch._C._functorch  # there is no public way to the numbers
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def refuse_nested_forward_mode() -> None:
    """Raise inside a jvp of a jvp, where torch drops what a custom function's derivative depends on."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    levels = functorch.get_interpreter_stack() or []
    if sum(level.key() == functorch.TransformType.Jvp for level in levels) > 1:
        raise TypeError(
            "forward mode within forward mode gives wrong second derivatives here; use torch.func.hessian, or "
            "jacrev for one of the two"
        )


def wide(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, all else as it is."""
    return tensor.to(WIDE.get(tensor.dtype, tensor.dtype))
