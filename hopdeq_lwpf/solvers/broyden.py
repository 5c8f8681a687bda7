"""Broyden's method with limited memory, one problem a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf.solvers.base import Iterate, Memory, check_count, check_number, pick


class _Memory(NamedTuple):
    z: Tensor
    r: Tensor
    size: Tensor  # (B,)
    hr: Tensor  # (B, n): H r
    left: tuple[Tensor, ...]  # (B, n) each: H = -I + sum_i left_i right_i^T, the inverse Jacobian of f(z) - z
    right: tuple[Tensor, ...]


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method (Broyden 1965) on f(z) - z = 0, starting from H = -I, which is Picard.

    A root finder: like Anderson it stops at saddles of an energy too. When the memory is full, or a row's
    residual grows by `restart` in one step, the row starts again from H = -I.

    memory: rank of the update, 2 memory numbers a state entry. warmup: Picard steps first.
    step_cap: longest step, in residuals.
    """

    memory: int = 10
    warmup: int = 1
    step_cap: float = 10.0
    restart: float = 4.0

    uses_energy = False
    uses_metric = False

    def __post_init__(self) -> None:
        check_count("memory", self.memory, 1)
        check_count("warmup", self.warmup, 1)
        check_number("step_cap", self.step_cap, 1.0)
        check_number("restart", self.restart, 1.0)

    def propose(self, memory: Memory, now: Iterate) -> tuple[Tensor, Memory]:
        r = now.fz - now.z
        size = torch.linalg.vector_norm(r, dim=-1)
        if memory is None or len(memory.left) == self.memory:
            return now.fz, _Memory(now.z, r, size, -r, (), ())
        fresh = _update(memory, now.z, r, size)
        length = torch.linalg.vector_norm(fresh.hr, dim=-1)
        poor = (size > self.restart * memory.size) | ~(length < float("inf"))
        if bool(poor.any()):
            fresh = _forget(poor, fresh)
            length = torch.where(poor, size, length)
        if now.step < self.warmup:
            return now.fz, fresh
        share = (self.step_cap * size / length.clamp_min(torch.finfo(r.dtype).tiny)).clamp_max(1.0)
        return torch.addcmul(now.z, share[:, None], fresh.hr, value=-1), fresh


def _update(old: _Memory, z: Tensor, r: Tensor, size: Tensor) -> _Memory:
    """H <- H + (s - H y) (s^T H) / (s^T H y); no update where the denominator is rounding noise."""
    s = z - old.z
    before = _apply(old.left, old.right, r)
    hy = before - old.hr  # H r is known of the point before
    sh = _apply(old.right, old.left, s)
    bottom = (s * hy).sum(-1, keepdim=True)
    lengths = torch.linalg.vector_norm(s, dim=-1, keepdim=True) * torch.linalg.vector_norm(
        hy, dim=-1, keepdim=True
    )
    gain = torch.where(bottom.abs() > 1e-8 * lengths, bottom, float("inf")).reciprocal()
    left = (s - hy) * gain
    hr = torch.addcmul(before, left, (sh * r).sum(-1, keepdim=True))
    return _Memory(z, r, size, hr, (*old.left, left), (*old.right, sh))


def _forget(rows: Tensor, memory: _Memory) -> _Memory:
    """H = -I in these rows."""
    zero = torch.zeros_like(memory.r)
    return memory._replace(
        hr=pick(rows, -memory.r, memory.hr),
        left=tuple(pick(rows, zero, part) for part in memory.left),
        right=tuple(pick(rows, zero, part) for part in memory.right),
    )


def _apply(left: tuple[Tensor, ...], right: tuple[Tensor, ...], v: Tensor) -> Tensor:
    """(-I + sum_i left_i right_i^T) v."""
    out = -v
    for one, other in zip(left, right, strict=True):
        out = torch.addcmul(out, one, (other * v).sum(-1, keepdim=True))
    return out
