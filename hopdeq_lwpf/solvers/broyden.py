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
    left: Tensor  # (B, m, n): H = -I + sum_i left_i right_i^T, the inverse Jacobian of f(z) - z
    right: Tensor  # (B, m, n)


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
        if memory is None or memory.left.shape[1] == self.memory:
            none = r.new_empty((r.shape[0], 0, r.shape[1]))
            return now.fz, _Memory(now.z, r, size, none, none)
        left, right = self._update(memory, now.z - memory.z, r - memory.r)
        poor = (size > self.restart * memory.size) | ~left[:, -1].isfinite().all(-1)
        left, right = (part.masked_fill(poor[:, None, None], 0.0) for part in (left, right))
        fresh = _Memory(now.z, r, size, left, right)
        if now.step < self.warmup:
            return now.fz, fresh
        step = -_apply(left, right, r)
        length = torch.linalg.vector_norm(step, dim=-1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)
        step = step * (self.step_cap * size[:, None] / length).clamp_max(1.0)
        return now.z + pick(step.isfinite().all(-1), step, r), fresh

    def _update(self, memory: _Memory, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """H <- H + (s - H y) (s^T H) / (s^T H y); no update where the denominator is rounding noise."""
        hy = _apply(memory.left, memory.right, y)
        sh = _apply(memory.right, memory.left, s)
        bottom = (s * hy).sum(-1, keepdim=True)
        lengths = torch.linalg.vector_norm(s, dim=-1, keepdim=True) * torch.linalg.vector_norm(
            hy, dim=-1, keepdim=True
        )
        good = bottom.abs() > 1e-8 * lengths
        gain = good / bottom.masked_fill(~good, 1.0)
        return torch.cat([memory.left, ((s - hy) * gain)[:, None]], 1), torch.cat(
            [memory.right, sh[:, None]], 1
        )


def _apply(left: Tensor, right: Tensor, v: Tensor) -> Tensor:
    """(-I + sum_i left_i right_i^T) v."""
    if not left.shape[1]:
        return -v
    return (left.transpose(1, 2) @ (right @ v[:, :, None])).squeeze(-1) - v
