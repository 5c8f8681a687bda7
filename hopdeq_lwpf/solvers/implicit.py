"""Attaches a gradient to an equilibrium without differentiating the solve, to any order.

The equilibrium z* = f(z*, theta) gets the gradient dL/dtheta = (df/dtheta)^T u, (I - J^T) u = dL/dz, from one
evaluation of f that is recorded at z*. A first derivative runs through that recording as any other does, so
it reaches whatever f used. For a second one the same formulas are themselves recorded: u is again the fixed
point of a function, u -> dL/dz + J^T u, and gets its gradient in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from hopdeq_lwpf._types import AdjointReport, ConvergenceWarning, Matvec, Result
from hopdeq_lwpf.solvers.linear import LinearOutcome, System
from hopdeq_lwpf.solvers.view import FlatFunction

AdjointSolve = Callable[[System], tuple[LinearOutcome, str]]


def attach(
    f: FlatFunction, z: Tensor, solve: AdjointSolve, report: AdjointReport, *, exact: bool = True
) -> tuple[Tensor, Tensor | None]:
    """z (B, n) with the gradient of the equilibrium, and what f reads out there, if that is wanted of f.

    f is evaluated once more at z with its graph recorded; that graph is all that is saved, however many steps
    the solve took, and it reaches whatever tensor f used: parameters, x, tensors that f closes over. A read-out
    that f makes on the way needs no evaluation of its own; None where there is no gradient to attach.
    exact: whether `solve` solves the adjoint system; if not, second derivatives are refused.
    """
    if not torch.is_grad_enabled():
        return z, None
    point = z.detach().requires_grad_()
    gates: list[_Gate] = []
    image, read, born = _record(f, point, gates)
    roots = [image.grad_fn, None if read is None else read.grad_fn]
    sources, hidden = _sources(roots, point, [gate.passed for gate in gates], born)
    if not sources and not hidden:
        return z, None
    metric = None
    if exact:
        with torch.no_grad(), f.full_precision():
            metric = f.metric(point.detach())
    # What is read out without a gradient, such as a decision, stays so.
    carried = read if read is not None and read.requires_grad else None
    recorded = _Recorded(
        f, point, image, tuple(sources), tuple(gates), solve, exact, report, metric, read=carried
    )
    refused = HIDDEN if hidden else "" if exact else INEXACT
    state, attached = _Attach.apply(image, z.detach(), recorded, refused, carried, *sources)
    return state, read if carried is None else attached


def gradient_of(image: Tensor, z: Tensor) -> Tensor:
    """z with the gradient of `image`, which approximates it; second derivatives are refused."""
    return _Attach.apply(image, z.detach(), None, INEXACT, None)[0] if image.requires_grad else z


HIDDEN = (
    "f closes over a tensor that was itself computed from something that requires grad; second derivatives need "
    "to know it. Hand it to f through x, or make it a parameter of f"
)
INEXACT = "this adjoint approximates the first derivative, and a derivative of the approximation is not a second one"


class _Gate:
    """A place where the recording of f ends and the history of a tensor of x begins; closed, nothing passes."""

    def __init__(self, tensor: Tensor) -> None:
        self.closed = False
        self.passed: Tensor = _Pass.apply(tensor, self)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gate: _Gate) -> Tensor:
        ctx.gate = gate
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        return (None if ctx.gate.closed else g), None


def _record(f: FlatFunction, point: Tensor, gates: list[_Gate]) -> tuple[Tensor, Tensor | None, int]:
    """f at the point with its graph, its read-out, and a number that every node of that graph exceeds."""

    def gated(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.requires_grad or leaf.is_leaf:
            return leaf
        gates.append(_Gate(leaf))
        return gates[-1].passed

    f = f.with_context(pytree.tree_map(gated, f.x))
    born = point.view_as(point).grad_fn._sequence_nr()  # type: ignore[union-attr]
    image, read = f.step(point) if f.reads else (f(point), None)
    return image, read, born


def _sources(
    roots: Sequence[Node | None], point: Tensor, passed: Sequence[Tensor], born: int
) -> tuple[list[Tensor], bool]:
    """The tensors besides the point that the roots depend on: leaves and gated ones; and whether there are more.

    More: tensors that are neither, but older than the recording, which only a closure can have brought in.
    """
    gated = {tensor.grad_fn: tensor for tensor in passed}
    found: dict[int, Tensor] = {}
    hidden = False
    nodes = list(roots)
    seen: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = gated.get(node, getattr(node, "variable", None))
        if variable is not None:
            if variable is not point:
                found[id(variable)] = variable
        elif node._sequence_nr() <= born:
            hidden = True
        else:
            nodes.extend(following for following, _ in node.next_functions)
    return list(found.values()), hidden


@dataclass(frozen=True)
class _Recorded:
    """A fixed-point function recorded at its fixed point, as a function of the point and the sources.

    `metric` is that of f; `flipped` says that the recorded map is linear with Jacobian J^T instead of J. A gradient
    to the read-out reaches the equilibrium like any other: it adds (d read / d z)^T to the incoming one.
    """

    f: FlatFunction
    point: Tensor  # (B, n), a leaf
    image: Tensor  # (B, n), recorded at the point
    sources: tuple[Tensor, ...]
    gates: tuple[_Gate, ...]
    solve: AdjointSolve
    exact: bool  # whether `solve` is meant to solve the system
    report: AdjointReport | None  # None: second derivatives keep none
    metric: Matvec | None
    flipped: bool = False
    read: Tensor | None = None  # recorded with the image

    def adjoint(self, g: Tensor) -> Tensor:
        """u for the incoming gradient g (B, n), without a graph."""
        # J of the linear map u -> g + J^T u is J^T, symmetric in the inverse metric: the flipped form.
        system = System(self._product, g, self.metric, self.f.eps, self.flipped)
        with torch.no_grad(), self.f.full_precision():
            outcome, method = self.solve(system)
        if self.report is not None:
            shape = self.f.view.batch_shape
            self.report.result = outcome.result.reshape(shape)
            self.report.residual = outcome.residual.reshape(shape)
            self.report.steps = outcome.steps.reshape(shape)
            self.report.method = method
        if self.exact:
            warn_unconverged(outcome, method)
        return outcome.u

    def _product(self, v: Tensor) -> Tensor:
        (product,) = self.partials(self.image, (self.point,), v)
        return torch.zeros_like(v) if product is None else product

    def partials(
        self, outputs: Any, inputs: Sequence[Tensor], v: Any, create_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        """v^T d(outputs)/d(inputs) within the recording: histories of the sources do not count."""
        # Solves nest: a product may be asked for in the middle of another walk through the recording.
        before = [gate.closed for gate in self.gates]
        for gate in self.gates:
            gate.closed = True
        try:
            return torch.autograd.grad(
                outputs, inputs, v, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        finally:
            for gate, closed in zip(self.gates, before, strict=True):
                gate.closed = closed

    def gradient_to_state(self, g: Tensor | None, read: Tensor | None) -> Tensor:
        """What comes to the equilibrium from the gradients to it and to the read-out, (B, n)."""
        total = torch.zeros_like(self.point) if g is None else g.detach()
        if read is not None and self.read is not None:
            (pulled,) = self.partials(self.read, (self.point,), read.detach())
            total = total if pulled is None else total + pulled
        return total

    def differentiable(self, z: Tensor, g: Tensor | None, read: Tensor | None) -> list[Tensor | None]:
        """The gradients of the sources, as functions of z, g, that of the read-out, and the sources."""
        given = [torch.zeros_like(z) if g is None else g, *([] if read is None else [read])]
        slopes = [gradient.detach().requires_grad_() for gradient in given]
        total = slopes[0]
        if read is not None:
            (pulled,) = self.partials(self.read, (self.point,), slopes[1], create_graph=True)
            total = total if pulled is None else total + pulled
        u0 = self.adjoint(total.detach())
        point = u0.detach().requires_grad_()
        (pulled,) = self.partials(self.image, (self.point,), point, create_graph=True)
        image = total.clone() if pulled is None else total + pulled
        around = (*slopes, self.point, *self.sources)
        linear = _Recorded(
            self.f, point, image, around, self.gates, self.solve, True, None, self.metric, not self.flipped
        )
        u, _ = _Attach.apply(image, u0, linear, "", None, *around)
        outputs, gradients = (self.image,), (u,)
        if read is not None:
            outputs, gradients = (self.image, self.read), (u, slopes[1])  # type: ignore[assignment]
        found = self.partials(outputs, self.sources, gradients, create_graph=True)
        return _reroute(self, found, (self.point, *slopes, *self.sources), (z, *given, *self.sources))


def _reroute(
    recorded: _Recorded,
    outputs: Sequence[Tensor | None],
    places: Sequence[Tensor],
    arguments: Sequence[Tensor],
) -> list[Tensor | None]:
    """Outputs that were recorded at the leaves `places`, as functions of the `arguments` of equal value."""
    given = [i for i, output in enumerate(outputs) if output is not None and output.requires_grad]
    result = list(outputs)
    if given:
        chosen = tuple(outputs[i] for i in given)
        rerouted = _Reroute.apply(recorded, chosen, tuple(places), *arguments)
        for i, output in zip(given, rerouted, strict=True):
            result[i] = output
    return result


class _Reroute(torch.autograd.Function):
    """Identity on what was recorded; gradients go to the arguments instead of the places of recording."""

    @staticmethod
    def forward(
        ctx: Any,
        recorded: _Recorded,
        outputs: tuple[Tensor, ...],
        places: tuple[Tensor, ...],
        *arguments: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.recorded, ctx.outputs, ctx.places = recorded, outputs, places
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        return tuple(output.detach().clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        arguments = ctx.saved_tensors
        used = [i for i, g in enumerate(gradients) if g is not None]
        outputs, slopes = [ctx.outputs[i] for i in used], [gradients[i] for i in used]
        if not used:
            return None, None, None, *(None for _ in arguments)
        if not torch.is_grad_enabled():
            return None, None, None, *ctx.recorded.partials(outputs, ctx.places, slopes)
        leaves = [slope.detach().requires_grad_() for slope in slopes]  # type: ignore[union-attr]
        found = ctx.recorded.partials(outputs, ctx.places, leaves, create_graph=True)
        places, there = (*ctx.places, *leaves), (*arguments, *slopes)
        return None, None, None, *_reroute(ctx.recorded, found, places, there)


class _Attach(torch.autograd.Function):
    """Returns z and the read-out; sends u to f(z, x) in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        z: Tensor,
        recorded: _Recorded | None,
        refused: str,
        read: Tensor | None,
        *sources: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.recorded, ctx.refused = recorded, refused
        ctx.set_materialize_grads(False)
        z = z.clone()
        ctx.save_for_backward(z)
        return z, None if read is None else read.view_as(read)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, read: Tensor | None) -> tuple[Any, ...]:
        recorded = ctx.recorded
        none = (None,) * (len(ctx.needs_input_grad) - 5)
        if g is None and read is None:
            return None, None, None, None, None, *none
        if torch.is_grad_enabled() and not ctx.refused:
            (z,) = ctx.saved_tensors
            return None, None, None, None, None, *recorded.differentiable(z, g, read)
        u = recorded.adjoint(recorded.gradient_to_state(g, read)) if recorded else g.detach()  # type: ignore[union-attr]
        read = None if read is None else read.detach()
        if torch.is_grad_enabled():
            u = Once.apply(u, ctx.saved_tensors[0], ctx.refused)
            read = None if read is None else Once.apply(read, ctx.saved_tensors[0], ctx.refused)
        return u, None, None, None, read, *none


class Once(torch.autograd.Function):
    """Marks the end of what can be differentiated, so that a second derivative is refused, never wrong."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, z: Tensor, reason: str) -> Tensor:
        # z requires grad, so the result does, whatever the incoming gradient was made of.
        ctx.reason = reason
        return u.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            f"no second derivative through this equilibrium: {ctx.reason}. adjoint='unrolled' and steps=k have "
            "second derivatives in any case."
        )


def warn_unconverged(outcome: LinearOutcome, method: str) -> None:
    """Say that an adjoint solve did not converge."""
    failed = int((outcome.result != Result.CONVERGED).sum())
    if failed:
        worst = float(outcome.residual.nan_to_num(float("inf")).max())
        warnings.warn(
            f"the adjoint solve ({method}) left {failed} of {outcome.result.numel()} problems unconverged; "
            f"worst residual {worst:.1e} of |gradient|. Their gradient is inexact. Raise max_steps or rtol "
            "of the adjoint, or solve the equilibrium more tightly.",
            ConvergenceWarning,
            stacklevel=4,
        )
