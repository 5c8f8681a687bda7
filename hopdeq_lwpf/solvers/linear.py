"""Solvers of the adjoint system (I - V) u = g, every row a system of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf._types import Matvec, Result, identity
from hopdeq_lwpf.solvers.base import pick

# A residual of so many units in the last place of f passes for converged: rounding leaves no less.
FLOOR = 50


@dataclass(frozen=True)
class System:
    """(I - V) u = g, where V is J^T in a first derivative and J in a second one.

    metric: the M in which J is self-adjoint, None where it is not known. Then J^T M is symmetric (`flipped`
    False, V = J^T) and so is M J (`flipped` True, V = J): either way the system has a symmetric form.
    eps: relative rounding of f.
    """

    product: Matvec  # v -> V v, (B, n) -> (B, n)
    g: Tensor  # (B, n)
    metric: Matvec | None
    eps: float
    flipped: bool = False

    def symmetric(self) -> tuple[Matvec, Matvec, Matvec]:
        """(A, left, right): A w = left(g) with A symmetric, and u = right(w)."""
        metric = self.metric or identity
        left, right = (metric, identity) if self.flipped else (identity, metric)

        def apply(w: Tensor) -> Tensor:
            u = right(w)
            return left(u - self.product(u))

        return apply, left, right

    def residual(self, u: Tensor) -> Tensor:
        """g - (I - V) u."""
        return self.g - (u - self.product(u))


@dataclass
class LinearOutcome:
    """u, and per row: the code, |g - (I - V) u| / |g| and the products with V used."""

    u: Tensor  # (B, n)
    result: Tensor  # (B,) int64
    residual: Tensor  # (B,)
    steps: Tensor  # (B,) int64


def _codes(done: Tensor, residual: Tensor, broken: Tensor | None = None) -> Tensor:
    code = torch.where(done, int(Result.CONVERGED), int(Result.MAX_STEPS))
    if broken is not None:
        code = torch.where(broken & ~done, int(Result.DIVERGED), code)
    return torch.where(residual.isfinite(), code, int(Result.NONFINITE))


def _no_steps(g: Tensor) -> Tensor:
    return torch.zeros(g.shape[0], dtype=torch.int64, device=g.device)


def conjugate_gradient(system: System, rtol: float, max_steps: int) -> LinearOutcome:
    """CG (Hestenes & Stiefel 1952) on the symmetric form, which is positive definite at a stable equilibrium.

    A row that meets negative curvature sits at a saddle; it stops there with the code DIVERGED.
    """
    apply, left, right = system.symmetric()
    g = left(system.g)
    w, r, p = torch.zeros_like(g), g, g
    rr = goal = g.square().sum(-1)
    goal = goal * rtol**2
    done = rr <= goal
    broken = torch.zeros_like(done)
    count = _no_steps(g)
    tiny = torch.finfo(g.dtype).tiny
    for _ in range(max_steps):
        active = ~(done | broken)
        if not bool(active.any()):
            break
        ap = apply(p)
        curvature = (p * ap).sum(-1)
        count = count + active
        broken = broken | (active & ~(curvature > 0))
        move = active & ~broken
        alpha = torch.where(move, rr / curvature, 0.0)[:, None]
        w_next, r_next = torch.addcmul(w, alpha, p), torch.addcmul(r, alpha, ap, value=-1)
        rr_next = r_next.square().sum(-1)
        p_next = torch.addcmul(r_next, (rr_next / rr.clamp_min(tiny))[:, None], p)
        if bool(move.all()):
            w, r, rr, p = w_next, r_next, rr_next, p_next
        else:
            # A selection, so that a row that has met NaN stays as it was.
            w, r, p = pick(move, w_next, w), pick(move, r_next, r), pick(move, p_next, p)
            rr = torch.where(move, rr_next, rr)
        done = done | (move & (rr <= goal))
    residual = _relative(rr, goal, rtol)
    return LinearOutcome(right(w), _codes(done, residual, broken), residual, count)


def _relative(rr: Tensor, goal: Tensor, rtol: float) -> Tensor:
    """|r| / |g|, 0 for g = 0."""
    size = (goal / rtol**2).sqrt()
    return torch.where(rr == 0, rr, rr.sqrt() / size)


def minres(system: System, rtol: float, max_steps: int) -> LinearOutcome:
    """MINRES (Paige & Saunders 1975) on the symmetric form: at saddles too, where CG breaks down.

    Three vectors a row and one product a step, with a residual that never grows.
    """
    apply, left, right = system.symmetric()
    g = left(system.g)
    tiny = torch.finfo(g.dtype).tiny
    size = torch.linalg.vector_norm(g, dim=-1)
    w, count = torch.zeros_like(g), _no_steps(g)
    v_old, v = torch.zeros_like(g), g / size.clamp_min(tiny)[:, None]
    d_old = d = torch.zeros_like(g)
    zero, one = torch.zeros_like(size), torch.ones_like(size)
    beta, phi = zero, size
    c_old, s_old, c, s = one, zero, one, zero
    done = phi <= rtol * size
    for _ in range(max_steps):
        active = ~done
        if not bool(active.any()):
            break
        count = count + active
        # Lanczos: A v = beta v_old + alpha v + beta_next v_next.
        q = apply(v) - beta[:, None] * v_old
        alpha = (q * v).sum(-1)
        q = q - alpha[:, None] * v
        beta_next = torch.linalg.vector_norm(q, dim=-1)
        # The new column of the tridiagonal matrix under the last two rotations, and one rotation more.
        epsilon, turned = s_old * beta, c_old * beta
        delta, gamma = c * turned + s * alpha, c * alpha - s * turned
        c_old, s_old = c, s
        radius = torch.hypot(gamma, beta_next).clamp_min(tiny)
        c, s = gamma / radius, beta_next / radius
        d_old, d = d, (v - delta[:, None] * d - epsilon[:, None] * d_old) / radius[:, None]
        w = pick(active, w + (c * phi)[:, None] * d, w)
        phi = torch.where(active, -s * phi, phi)
        v_old, v = v, q / beta_next.clamp_min(tiny)[:, None]
        beta = beta_next
        done = done | ~(phi.abs() > rtol * size)
    u = right(w)
    residual = torch.linalg.vector_norm(left(system.residual(u)), dim=-1)
    residual = torch.where(residual == 0, residual, residual / size)
    # The recurrence and the true residual part by rounding, which grows with the condition of the system.
    return LinearOutcome(u, _codes(residual <= rtol + FLOOR * system.eps, residual), residual, count)


def gmres(
    system: System, rtol: float, max_steps: int, start: Tensor | None = None, restart: int = 20
) -> LinearOutcome:
    """Restarted GMRES (Saad & Schultz 1986); for any V. Each cycle keeps `restart` vectors a row."""
    g = system.g
    u = torch.zeros_like(g) if start is None else start
    size = torch.linalg.vector_norm(g, dim=-1)
    goal = rtol * size
    count = _no_steps(g)
    r = g if start is None else system.residual(u)
    norm = torch.linalg.vector_norm(r, dim=-1)
    left = max_steps
    while left > 0 and bool((norm > goal).any()):
        active = norm > goal
        step, used, count = _cycle(system.product, r, norm, goal, min(restart, left), count)
        left -= used
        u = pick(active, u + step, u)
        r = pick(active, system.residual(u), r)
        before, norm = norm, torch.linalg.vector_norm(r, dim=-1)
        # At the rounding floor a new cycle gains nothing.
        if not bool(((norm > goal) & (norm < 0.9 * before)).any()):
            break
    residual = torch.where(norm == 0, norm, norm / size)
    return LinearOutcome(u, _codes(norm <= goal, residual), residual, count)


def neumann(system: System, terms: int) -> LinearOutcome:
    """u = sum of V^i g over i < terms: recurrent backpropagation cut off after so many terms.

    The residual is that of this u, |V^terms g| / |g|, for one more product.
    """
    u = term = system.g
    for _ in range(terms - 1):
        term = system.product(term)
        u = u + term
    size = torch.linalg.vector_norm(system.g, dim=-1)
    rest = torch.linalg.vector_norm(system.product(term), dim=-1)
    residual = torch.where(rest == 0, rest, rest / size)
    done = residual <= max(1e-6, FLOOR * system.eps)
    return LinearOutcome(u, _codes(done, residual), residual, torch.full_like(_no_steps(size), terms))


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
