"""fixed_point under torch.func: grad, vjp, jacrev and vmap, alone or nested.

A transform must see every tensor as an argument, and no decision may depend on data. So the whole solve is one
autograd.Function of the start, the tensors of x and the parameters of f. Under vmap that function is called
once for all the problems of all calls, with f vmapped inside, and decides freely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.utils import _pytree as pytree

from hopdeq_lwpf._types import Matvec, identity, refuse_nested_forward_mode
from hopdeq_lwpf.solvers.base import Deferred, Solver
from hopdeq_lwpf.solvers.implicit import AdjointSolve, warn_unconverged
from hopdeq_lwpf.solvers.linear import System
from hopdeq_lwpf.solvers.loop import Outcome, run
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.view import FlatFunction

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # z, result, residual, steps, evaluations


def solve(
    f: FlatFunction, z0: Tensor, solver: Solver, stop: Termination, linear: AdjointSolve
) -> tuple[Tensor, Outcome]:
    """The equilibrium (B, n) from z0, and the outcome; both carry whatever transforms are active."""
    refuse_nested_forward_mode()
    with torch.no_grad():
        symmetric = f.metric(z0) is identity
    problem, tensors = _Nonlinear.of(f, solver, stop, linear, symmetric)
    _refuse_closures(problem, z0, tensors)
    z, *counts = _Solve.apply(problem, z0.detach(), *tensors)
    return z, Outcome(z, *counts)


def _refuse_closures(problem: _Nonlinear, z0: Tensor, tensors: list[Tensor]) -> None:
    """Raise if f depends on a tensor that it was not given: its gradient or its vmapped values would be lost."""
    functorch = torch._C._functorch
    # None of these requires grad or is vmapped, at any level, so whatever is came with f.
    blank = [(torch.ones if t.is_floating_point() else torch.zeros)(t.shape, dtype=t.dtype, device=t.device)
             for t in (z0, *tensors)]  # fmt: skip
    with torch.enable_grad():
        out = problem.call(*blank)
    while True:
        if out.requires_grad or functorch.is_batchedtensor(out):
            raise TypeError(
                "under torch.func every tensor that f uses and that is differentiated or vmapped must be a parameter "
                "of f (an nn.Module) or handed to f through x; this f closes over one"
            )
        if not functorch.is_functorch_wrapped_tensor(out):
            return
        out = functorch.get_unwrapped(out)


class _Problem(Protocol):
    """A fixed point z = call(z, *tensors) and how it is found; z is (B, n), a tensor of `tensors` anything."""

    @property
    def symmetric(self) -> bool: ...

    @property
    def linear(self) -> AdjointSolve: ...

    @property
    def f(self) -> FlatFunction: ...

    def call(self, z: Tensor, *tensors: Tensor) -> Tensor: ...

    def run(self, z0: Tensor, *tensors: Tensor) -> Outputs: ...

    def batched(self, size: int, dims: tuple[int | None, ...]) -> _Problem: ...


class _Solve(torch.autograd.Function):
    """The solution of a problem as a function of its tensors; the adjoint is one more such solution."""

    @staticmethod
    def forward(problem: _Problem, z0: Tensor, *tensors: Tensor) -> Outputs:
        return problem.run(z0, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.problem = inputs[0]
        ctx.save_for_backward(output[0], *inputs[2:])
        ctx.save_for_forward(output[0], *inputs[2:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, *counts: Tensor) -> tuple[Any, ...]:
        z, *tensors = ctx.saved_tensors
        u = _Solve.apply(_Linear(ctx.problem), g, g, z, *tensors)[0]
        smooth = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]
        pull = vjp(_of(ctx.problem, z, tensors, smooth), *(tensors[i] for i in smooth))[1]
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(smooth, pull(u), strict=True):
            gradients[i] = gradient
        return None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, none: None, z0: Tensor | None, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        z, *tensors = ctx.saved_tensors
        moved = [i for i, slope in enumerate(slopes) if slope is not None]
        given = tuple(tensors[i] for i in moved), tuple(slopes[i] for i in moved)
        b = jvp(_of(ctx.problem, z, tensors, moved), *given)[1]
        dz = _Solve.apply(_Linear(ctx.problem, transposed=False), b, b, z, *tensors)[0]
        return dz, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], problem: _Problem, z0: Tensor, *tensors: Tensor
    ) -> tuple[Outputs, tuple[int, ...]]:
        size = info.batch_size
        dims = tuple(None if d is None else 0 for d in in_dims[2:])
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[2:], strict=True)]
        start = z0.expand(size, *z0.shape) if in_dims[1] is None else z0.movedim(in_dims[1], 0)
        flat = start.reshape(-1, start.shape[-1])
        outputs = _Solve.apply(problem.batched(size, dims), flat, *moved)
        shaped = tuple(output.reshape(*start.shape[:2], *output.shape[1:]) for output in outputs)
        return shaped, (0,) * len(shaped)


def _of(problem: _Problem, z: Tensor, tensors: list[Tensor], places: list[int]) -> Callable[..., Tensor]:
    """The map at z as a function of the tensors at some places."""

    def call(*given: Tensor) -> Tensor:
        every = list(tensors)
        for i, tensor in zip(places, given, strict=True):
            every[i] = tensor
        return problem.call(z, *every)

    return call


@dataclass(frozen=True)
class _Nonlinear:
    """f itself."""

    f: FlatFunction
    bind: Callable[..., FlatFunction]  # the tensors -> f with them in place
    solver: Solver
    stop: Termination
    linear: AdjointSolve
    symmetric: bool

    @classmethod
    def of(
        cls, f: FlatFunction, solver: Solver, stop: Termination, linear: AdjointSolve, symmetric: bool
    ) -> tuple[_Nonlinear, list[Tensor]]:
        """The problem, and the tensors that f is given: x's, and f's parameters and buffers."""
        leaves, spec = pytree.tree_flatten(f.x)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        module = f.f if isinstance(f.f, nn.Module) else None
        named = dict(module.named_parameters()) | dict(module.named_buffers()) if module is not None else {}

        def bind(*tensors: Tensor) -> FlatFunction:
            filled = list(leaves)
            for i, tensor in zip(places, tensors, strict=False):
                filled[i] = tensor
            bound = f.with_context(pytree.tree_unflatten(filled, spec))
            if module is None:
                return bound
            return bound.of_function(_Bound(module, dict(zip(named, tensors[len(places) :], strict=True))))

        return cls(f, bind, solver, stop, linear, symmetric), [*(leaves[i] for i in places), *named.values()]

    def call(self, z: Tensor, *tensors: Tensor) -> Tensor:
        # A backward pass calls this outside of the autocast region that the forward pass was in.
        with self.f.recorded_precision():
            return self.bind(*tensors)(z)

    def evaluate(self, z: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        fz, energy, piece = self.bind(*tensors).evaluate(z)
        return (fz, energy()) if piece is None else (fz, energy(), piece)

    def run(self, z0: Tensor, *tensors: Tensor) -> Outputs:
        return _iterate(self, self.bind(*tensors), z0)

    def batched(self, size: int, dims: tuple[int | None, ...]) -> _Problem:
        return _Batched(self, size, dims)


@dataclass(frozen=True)
class _Linear:
    """u = g + J^T u, or g + J u, J being that of another problem: its tensors are g, z and those of the other."""

    of: _Problem
    transposed: bool = True

    @property
    def symmetric(self) -> bool:
        return self.of.symmetric

    @property
    def linear(self) -> AdjointSolve:
        return self.of.linear

    @property
    def f(self) -> FlatFunction:
        return self.of.f

    def product(self, v: Tensor, *tensors: Tensor) -> Tensor:
        return self._products(tensors)(v)

    def _products(self, tensors: tuple[Tensor, ...]) -> Matvec:
        _, z, *others = tensors

        def call(z: Tensor) -> Tensor:
            return self.of.call(z, *others)

        if not self.transposed:
            return lambda v: jvp(call, (z,), (v,))[1]
        pull = vjp(call, z)[1]
        return lambda v: pull(v)[0]

    def call(self, z: Tensor, *tensors: Tensor) -> Tensor:
        return tensors[0] + self.product(z, *tensors)

    def run(self, z0: Tensor, *tensors: Tensor) -> Outputs:
        return _solve_linear(self, self._products(tensors), tensors[0])

    def batched(self, size: int, dims: tuple[int | None, ...]) -> _Problem:
        return _Batched(self, size, dims)


@dataclass(frozen=True)
class _Batched:
    """A problem vmapped `size` times: its rows one after another."""

    of: Any  # _Nonlinear, _Linear or _Batched
    size: int
    dims: tuple[int | None, ...]  # vmapped dimension of each tensor

    symmetric = property(lambda self: self.of.symmetric)
    linear = property(lambda self: self.of.linear)
    f = property(lambda self: self.of.f)
    solver = property(lambda self: self.of.solver)
    stop = property(lambda self: self.of.stop)

    def _rows(self, function: Callable[..., Any], z: Tensor, tensors: tuple[Tensor, ...]) -> Any:
        apart = z.reshape(self.size, -1, z.shape[-1])
        out = torch.vmap(function, in_dims=(0, *self.dims))(apart, *tensors)
        return pytree.tree_map(lambda t: t.reshape(z.shape[0], *t.shape[2:]), out)

    def call(self, z: Tensor, *tensors: Tensor) -> Tensor:
        return self._rows(self.of.call, z, tensors)

    def evaluate(self, z: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._rows(self.of.evaluate, z, tensors)

    def product(self, v: Tensor, *tensors: Tensor) -> Tensor:
        return self._rows(self.of.product, v, tensors)

    def run(self, z0: Tensor, *tensors: Tensor) -> Outputs:
        if hasattr(_innermost(self), "product"):
            g = self._rows(lambda v, g, *rest: g.expand_as(v), z0, tensors)
            return _solve_linear(self, lambda v: self.product(v, *tensors), g)
        return _iterate(self, _Function(self, tensors), z0)

    def batched(self, size: int, dims: tuple[int | None, ...]) -> _Problem:
        return _Batched(self, size, dims)


def _innermost(problem: Any) -> Any:
    while isinstance(problem, _Batched):
        problem = problem.of
    return problem


class _Function(FlatFunction):
    """A vmapped function for the loop, which cannot tell which of its tensors belong to which row."""

    def __init__(self, problem: _Batched, tensors: tuple[Tensor, ...]) -> None:
        self.__dict__.update(problem.f.__dict__)
        self._problem = problem
        self._tensors = tensors

    def __call__(self, flat: Tensor) -> Tensor:
        return self._problem.call(flat, *self._tensors)

    def evaluate(self, flat: Tensor) -> tuple[Tensor, Deferred, Tensor | None]:
        fz, energy, *piece = self._problem.evaluate(flat, *self._tensors)
        return fz, Deferred(lambda: energy), piece[0] if piece else None

    def metric(self, flat: Tensor) -> Matvec | None:
        return identity if self._problem.symmetric else None

    def narrow(self, live: Tensor) -> None:
        return None


class _Bound:
    """A module whose methods run with other parameters and buffers than its own."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        self._module = module
        self._methods = _Methods(module)
        self._tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}

    def __call__(self, *arguments: Any) -> Any:
        return functional_call(self._methods, self._tensors, ("__call__", *arguments))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not callable(value):
            return value
        return lambda *arguments: functional_call(self._methods, self._tensors, (name, *arguments))


class _Methods(nn.Module):
    """Any method of a module as a forward, which is all that functional_call knows."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, name: str, *arguments: Any) -> Any:
        return getattr(self.module, name)(*arguments)


def _iterate(problem: Any, f: FlatFunction, z0: Tensor) -> Outputs:
    with torch.no_grad():
        outcome = run(f, z0, problem.solver, problem.stop)
    # A Function may not return its input, nor one tensor twice.
    counts = (outcome.result, outcome.residual, outcome.steps, outcome.evaluations)
    return outcome.z.clone(), *(count.clone() for count in counts)  # type: ignore[return-value]


def _solve_linear(problem: _Problem, product: Matvec, g: Tensor) -> Outputs:
    f = problem.f
    with torch.no_grad(), f.full_precision():
        metric = identity if problem.symmetric else None
        outcome, method = problem.linear(System(product, g, metric, f.eps))
    warn_unconverged(outcome, method)
    counts = (outcome.result, outcome.residual, outcome.steps, outcome.steps)
    return outcome.u.clone(), *(count.clone() for count in counts)  # type: ignore[return-value]
