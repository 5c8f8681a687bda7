"""Attaches a gradient to an equilibrium without differentiating the solve."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hopdeq_lwpf._types import AdjointReport, ConvergenceWarning, Matvec, Result
from hopdeq_lwpf.solvers.linear import LinearOutcome
from hopdeq_lwpf.solvers.view import FlatFunction

# Given the vector-Jacobian product, the metric at z*, g and the rounding of f: u with (I - J^T) u = g.
AdjointSolve = Callable[[Matvec, "Matvec | None", Tensor, float], tuple[LinearOutcome, str]]


def attach(f: FlatFunction, z: Tensor, solve: AdjointSolve, report: AdjointReport) -> Tensor:
    """z (B, n) with the gradient of the equilibrium: dL/dtheta = (df/dtheta)^T u, (I - J^T) u = dL/dz.

    f is evaluated once more at z with its graph recorded; that graph is all that is saved, however many steps
    the solve took, and it reaches whatever tensor f used: parameters, x, tensors that f closes over.
    """
    if not torch.is_grad_enabled():
        return z
    point = z.detach().requires_grad_()
    image = f(point)
    if not _uses_more(image, point):
        return z
    return _Attach.apply(image, z.detach(), _Adjoint(f, point, image, solve, report))


def _uses_more(image: Tensor, point: Tensor) -> bool:
    """Whether the image depends on any tensor that requires grad besides the point."""
    nodes, seen = [image.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not point:
            return True
        nodes.extend(following for following, _ in node.next_functions)
    return False


class _Adjoint:
    """What the backward pass needs: the recorded evaluation of f at z* and how to solve."""

    def __init__(
        self, f: FlatFunction, point: Tensor, image: Tensor, solve: AdjointSolve, report: AdjointReport
    ) -> None:
        self.f = f
        self.point = point
        self.image = image
        self.solve = solve
        self.report = report

    def __call__(self, g: Tensor) -> Tensor:
        """u for the incoming gradient g (B, n)."""
        with torch.no_grad(), self.f.full_precision():
            metric = self.f.metric(self.point.detach())
            outcome, method = self.solve(self._vjp, metric, g, self.f.eps)
        shape = self.f.view.batch_shape
        self.report.result = outcome.result.reshape(shape)
        self.report.residual = outcome.residual.reshape(shape)
        self.report.steps = outcome.steps.reshape(shape)
        self.report.method = method
        failed = int((outcome.result != Result.CONVERGED).sum())
        if failed:
            worst = float(outcome.residual.nan_to_num(float("inf")).max())
            warnings.warn(
                f"the adjoint solve ({method}) left {failed} of {outcome.result.numel()} problems unconverged; "
                f"worst residual {worst:.1e} of |gradient|. Their gradient is inexact. Raise max_steps or rtol "
                "of the adjoint, or solve the equilibrium more tightly.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return outcome.u

    def _vjp(self, v: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(self.image, self.point, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if product is None else product


class _Attach(torch.autograd.Function):
    """Returns z; sends u to f(z, x) in the backward pass."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, z: Tensor, adjoint: _Adjoint) -> Tensor:
        ctx.adjoint = adjoint
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        u = ctx.adjoint(g.detach())
        return (_Once.apply(u, ctx.adjoint.image) if torch.is_grad_enabled() else u), None, None


class _Once(torch.autograd.Function):
    """Marks the end of what can be differentiated, so that a second derivative is refused, never wrong."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, image: Tensor) -> Tensor:
        # `image` requires grad, so the result does, whatever the incoming gradient was made of.
        return u.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "an implicit adjoint cannot be differentiated twice; use adjoint='unrolled' or steps=k for second "
            "derivatives through the equilibrium"
        )
