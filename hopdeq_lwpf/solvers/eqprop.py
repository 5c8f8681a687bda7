"""Attaches the gradient of equilibrium propagation to an equilibrium (Scellier & Bengio 2017).

For a loss with gradient g at z*, the energy E(z) + b g.z has its minimum at z(b), and

    dL/dtheta = d/db dE/dtheta(z(b)) at b = 0 = (dE/dtheta(z(b)) - dE/dtheta(z(-b))) / 2b + O(b^2),

the symmetric contrast of Laborieux et al. 2021. Nothing is propagated backwards through f: it is solved twice more,
with a constant added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hopdeq_lwpf._types import AdjointReport, Result
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.implicit import Once, warn_unconverged
from hopdeq_lwpf.solvers.linear import LinearOutcome
from hopdeq_lwpf.solvers.loop import Outcome, run
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.view import FlatFunction

CONTRAST = "equilibrium propagation contrasts two solves, and their difference has no derivative"


@dataclass(frozen=True)
class Nudge:
    """How an equilibrium is nudged: by solutions of z = f(z) -+ push, |push| = size |z*|."""

    size: float
    solver: Solver
    stop: Termination


def attach_contrast(f: FlatFunction, z: Tensor, nudge: Nudge, report: AdjointReport) -> Tensor:
    """z (B, n) with the gradient of the contrast; f has an energy with gradient c (z - f(z)), c > 0 for each row."""
    if not torch.is_grad_enabled():
        return z
    outer: list[Tensor] = []
    inner: list[Tensor] = []

    def cut(leaf: Any) -> Any:
        """A leaf in the place of a tensor of x that has a history: its gradient is handed on from here."""
        if not isinstance(leaf, Tensor) or not leaf.requires_grad or leaf.is_leaf:
            return leaf
        outer.append(leaf)
        inner.append(leaf.detach().requires_grad_())
        return inner[-1]

    f = f.with_context(pytree.tree_map(cut, f.x))
    with f.recorded_precision():
        energy = _energy(f, z.detach())
    others = [leaf for leaf in _leaves(energy) if all(leaf is not own for own in inner)]
    if not inner and not others:
        return z
    contrast = _Contrast(f, z.detach(), nudge, report, (*inner, *others))
    return _Attach.apply(z.detach(), contrast, *outer, *others)


def _energy(f: FlatFunction, z: Tensor) -> Tensor:
    """E, (B, n) -> (B,)."""
    function: Any = f.f
    return function.energy(f.view.unflatten(z), f.x).reshape(-1)


def _leaves(root: Tensor) -> list[Tensor]:
    """The leaves that require grad and that the root depends on."""
    found: dict[int, Tensor] = {}
    nodes, seen = [root.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        nodes.extend(following for following, _ in node.next_functions)
    return list(found.values())


class _Nudged(FlatFunction):
    """z -> f(z) - push, over the same rows."""

    def __init__(self, f: FlatFunction, push: Tensor) -> None:
        self.__dict__.update(f.__dict__)
        self._push = push
        # The energy of this one is not known to a factor; solvers go by residuals. Its rows stay together.
        self.has_energy, self._evaluate, self._select = False, None, None

    def __call__(self, flat: Tensor) -> Tensor:
        return super().__call__(flat) - self._push


@dataclass(frozen=True)
class _Contrast:
    f: FlatFunction
    z: Tensor  # (B, n)
    nudge: Nudge
    report: AdjointReport
    sources: Sequence[Tensor]

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        """dL/dsource for the incoming gradient g (B, n)."""
        length = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        silent = length == 0
        unit = g / length.masked_fill(silent, 1.0)
        size = torch.linalg.vector_norm(self.z, dim=-1, keepdim=True)
        push = unit * self.nudge.size * torch.where(size > 0, size, 1.0)
        ends, outcomes = [], []
        for sign in (1.0, -1.0):
            with torch.no_grad(), self.f.full_precision():
                nudged = _Nudged(self.f, sign * push)
            with torch.no_grad(), self.f.recorded_precision():
                outcomes.append(run(nudged, self.z, self.nudge.solver, self.nudge.stop, drop=False))
            ends.append(outcomes[-1].z)
        self._tell(outcomes)
        with torch.enable_grad(), self.f.recorded_precision():
            points = [end.detach().requires_grad_() for end in ends]
            energies = [_energy(self.f, point) for point in points]
            slopes = torch.autograd.grad([energy.sum() for energy in energies], points, retain_graph=True)
            # dE/dz = -b g at z(b): the b that the energy felt, whatever the step length of f.
            felt = [-(slope * unit).sum(-1) for slope in slopes]
            width = (felt[0] - felt[1]).detach()
            share = (length.squeeze(-1) / width.masked_fill(silent.squeeze(-1), 1.0)).masked_fill(
                silent.squeeze(-1), 0.0
            )
            return list(torch.autograd.grad(energies, self.sources, [share, -share], allow_unused=True))

    def _tell(self, outcomes: list[Outcome]) -> None:
        """Fill the report with the worse of the two solves; warn where one failed."""
        first, second = outcomes
        outcome = LinearOutcome(
            self.z,
            torch.maximum(first.result, second.result),
            torch.maximum(first.residual, second.residual) / self.nudge.size,
            first.evaluations + second.evaluations,
        )
        shape = self.f.view.batch_shape
        self.report.result = outcome.result.reshape(shape)
        self.report.residual = outcome.residual.reshape(shape)
        self.report.steps = outcome.steps.reshape(shape)
        self.report.method = "eqprop"
        if bool((outcome.result != Result.CONVERGED).any()):
            warn_unconverged(outcome, "eqprop")


class _Attach(torch.autograd.Function):
    """Returns z; sends the contrast to the sources in the backward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, contrast: _Contrast, *sources: Tensor) -> Tensor:
        ctx.contrast = contrast
        z = z.clone()
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (z,) = ctx.saved_tensors
        with torch.no_grad():
            found = ctx.contrast.gradients(g)
        if torch.is_grad_enabled():
            found = [part if part is None else Once.apply(part, z, CONTRAST) for part in found]
        return None, None, *found
