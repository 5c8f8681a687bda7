"""Solvers of the adjoint system (I - J^T) u = g, every row a system of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf._types import Matvec, Result
from hopdeq_lwpf.solvers.base import pick


@dataclass
class LinearOutcome:
    """u, and per row: the code, |g - (I - J^T) u| / |g| and the vector-Jacobian products used."""

    u: Tensor  # (B, n)
    result: Tensor  # (B,) int64
    residual: Tensor  # (B,)
    steps: Tensor  # (B,) int64


def _codes(done: Tensor, residual: Tensor, broken: Tensor | None = None) -> Tensor:
    code = torch.where(done, int(Result.CONVERGED), int(Result.MAX_STEPS))
    if broken is not None:
        code = torch.where(broken & ~done, int(Result.DIVERGED), code)
    return torch.where(residual.isfinite(), code, int(Result.NONFINITE))


def conjugate_gradient(vjp: Matvec, g: Tensor, metric: Matvec, rtol: float, max_steps: int) -> LinearOutcome:
    """CG on (I - J^T) M w = g, u = M w, which is symmetric positive definite at a stable equilibrium.

    M is the metric in which J is self-adjoint (Hestenes & Stiefel 1952 for M = I). A row that meets
    negative curvature sits at a saddle; it stops there with the code DIVERGED.
    """
    w, r, p = torch.zeros_like(g), g, g
    rr = goal = g.square().sum(-1)
    goal = goal * rtol**2
    done = rr <= goal
    broken = torch.zeros_like(done)
    count = torch.zeros(g.shape[0], dtype=torch.int64, device=g.device)
    for _ in range(max_steps):
        active = ~(done | broken)
        if not bool(active.any()):
            break
        mp = metric(p)
        ap = mp - vjp(mp)
        curvature = (p * ap).sum(-1)
        count = count + active
        broken = broken | (active & ~(curvature > 0))
        move = active & ~broken
        alpha = torch.where(move, rr / curvature, 0.0)[:, None]
        w = pick(move, w + alpha * p, w)
        r = pick(move, r - alpha * ap, r)
        rr_next = r.square().sum(-1)
        p = pick(move, r + (rr_next / rr.clamp_min(torch.finfo(rr.dtype).tiny))[:, None] * p, p)
        rr = rr_next
        done = done | (move & (rr <= goal))
    residual = _relative(rr, goal, rtol)
    return LinearOutcome(metric(w), _codes(done, residual, broken), residual, count)


def _relative(rr: Tensor, goal: Tensor, rtol: float) -> Tensor:
    """|r| / |g|, 0 for g = 0."""
    size = (goal / rtol**2).sqrt()
    return torch.where(rr == 0, rr, rr.sqrt() / size)


def gmres(vjp: Matvec, g: Tensor, u: Tensor, rtol: float, max_steps: int, restart: int = 20) -> LinearOutcome:
    """Restarted GMRES (Saad & Schultz 1986) from u; for any J. Each cycle keeps `restart` vectors a row."""
    size = torch.linalg.vector_norm(g, dim=-1)
    goal = rtol * size
    count = torch.zeros(g.shape[0], dtype=torch.int64, device=g.device)
    r = g - (u - vjp(u)) if bool((u != 0).any()) else g
    norm = torch.linalg.vector_norm(r, dim=-1)
    left = max_steps
    while left > 0 and bool((norm > goal).any()):
        active = norm > goal
        step, used, count = _cycle(vjp, r, norm, goal, min(restart, left), count)
        left -= used
        u = pick(active, u + step, u)
        r = pick(active, g - (u - vjp(u)), r)
        before, norm = norm, torch.linalg.vector_norm(r, dim=-1)
        # At the rounding floor a new cycle gains nothing.
        if not bool(((norm > goal) & (norm < 0.9 * before)).any()):
            break
    residual = torch.where(norm == 0, norm, norm / size)
    return LinearOutcome(u, _codes(norm <= goal, residual), residual, count)


def _cycle(
    vjp: Matvec, r: Tensor, norm: Tensor, goal: Tensor, length: int, count: Tensor
) -> tuple[Tensor, int, Tensor]:
    """One Arnoldi cycle with Givens rotations: the correction, the products spent, the new counts."""
    tiny = torch.finfo(r.dtype).tiny
    basis = [r / norm.clamp_min(tiny)[:, None]]
    columns: list[Tensor] = []  # rotated columns of the Hessenberg matrix, each (B, k + 1)
    turns: list[tuple[Tensor, Tensor]] = []
    rhs = [norm]
    for _ in range(length):
        active = rhs[-1].abs() > goal
        if not bool(active.any()):
            break
        count = count + active
        v = basis[-1]
        v = v - vjp(v)
        stack = torch.stack(basis, 1)
        # Classical Gram-Schmidt twice is as stable as modified, in two products instead of k.
        h = torch.zeros_like(stack[:, :, 0])
        for _ in range(2):
            part = (stack @ v[:, :, None]).squeeze(-1)
            v = v - (part[:, None, :] @ stack).squeeze(1)
            h = h + part
        below = torch.linalg.vector_norm(v, dim=-1)
        basis.append(v / below.clamp_min(tiny)[:, None])
        column = list(h.unbind(1))
        for i, (c, s) in enumerate(turns):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        length_h = torch.hypot(column[-1], below).clamp_min(tiny)
        c, s = column[-1] / length_h, below / length_h
        turns.append((c, s))
        column[-1] = length_h
        columns.append(torch.stack(column, 1))
        rhs[-1:] = [c * rhs[-1], -s * rhs[-1]]
    return _back_substitute(columns, rhs, basis), len(columns), count


def _back_substitute(columns: list[Tensor], rhs: list[Tensor], basis: list[Tensor]) -> Tensor:
    size = len(columns)
    weights: list[Tensor] = [torch.empty(0)] * size
    for i in range(size - 1, -1, -1):
        total = rhs[i]
        for j in range(i + 1, size):
            total = total - columns[j][:, i] * weights[j]
        weights[i] = total / columns[i][:, i]
    step = torch.zeros_like(basis[0])
    for weight, vector in zip(weights, basis, strict=False):
        # Rows that had nothing left to do divide 0 by 0.
        step = torch.addcmul(step, weight.nan_to_num(0.0, 0.0, 0.0)[:, None], vector)
    return step
