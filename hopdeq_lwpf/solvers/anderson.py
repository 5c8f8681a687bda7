"""Anderson acceleration, one small problem a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf.solvers.base import Iterate, Memory, check_count, check_number, pick


class _Memory(NamedTuple):
    z: Tensor
    r: Tensor
    size: Tensor  # (B,): residual norm of the point before
    steps: Tensor  # (B, m, n): differences of the states, oldest first
    falls: Tensor  # (B, m, n): differences of the residuals


@dataclass(frozen=True)
class Anderson:
    """Anderson mixing (Walker & Ni 2011, type II) in difference form, solved for each problem by itself.

    The columns are scaled to unit norm before the small system is regularised: an absolute ridge stalls once
    the residuals are small. As a root finder it is drawn to saddles too, so it may recall another memory than
    the dynamics do; where f has an energy prefer `LBFGS`.

    memory: differences kept. damping: 0 = none; the share of the mixed residual that is left out.
    ridge: added to the Gram matrix of unit columns. warmup: Picard steps first.
    patience: stay with Picard until so many more plain steps are predicted from the observed rate
    (0: accelerate at once); a map that contracts quickly is done sooner without.
    restart: drop the history of a row whose residual grew by this factor in one step.
    """

    memory: int = 5
    damping: float = 0.0
    ridge: float = 1e-7
    warmup: int = 1
    patience: int = 0
    restart: float = 4.0

    uses_energy = False
    uses_metric = False

    def __post_init__(self) -> None:
        check_count("memory", self.memory, 1)
        check_number("damping", self.damping, 0.0, 1.0)
        if self.damping == 1:
            raise ValueError("damping must be below 1: at 1 the state never moves")
        check_number("ridge", self.ridge, 0.0)
        check_count("warmup", self.warmup, 1)
        check_count("patience", self.patience, 0)
        check_number("restart", self.restart, 1.0)

    def propose(self, memory: Memory, now: Iterate) -> tuple[Tensor, Memory]:
        r = now.fz - now.z
        plain = now.z + (1 - self.damping) * r
        size = torch.linalg.vector_norm(r, dim=-1)
        if memory is None:
            none = r.new_empty((r.shape[0], 0, r.shape[1]))
            return plain, _Memory(now.z, r, size, none, none)
        steps = _push(memory.steps, now.z - memory.z, self.memory)
        falls = _push(memory.falls, r - memory.r, self.memory)
        grew = size > self.restart * memory.size
        fresh = _Memory(now.z, r, size, _forget(grew, steps), _forget(grew, falls))
        if now.step < self.warmup:
            return plain, fresh
        accelerate = ~grew
        if self.patience:
            accelerate = accelerate & self._slow(size, memory.size, now)
        mixed = self._mix(now.z, r, fresh)
        accelerate = accelerate & mixed.isfinite().all(-1)
        return pick(accelerate, mixed, plain), fresh

    def _slow(self, size: Tensor, before: Tensor, now: Iterate) -> Tensor:
        """Whether `patience` more plain steps would not bring the residual down to the tolerance."""
        floor = max(now.rtol, now.eps) * torch.linalg.vector_norm(now.fz, dim=-1)
        return size * (size / before).clamp(0, 1) ** self.patience > floor

    def _mix(self, z: Tensor, r: Tensor, memory: _Memory) -> Tensor:
        """z + (1 - damping) r - (dZ + (1 - damping) dR) gamma, gamma = argmin |r - dR gamma|."""
        scale = torch.linalg.vector_norm(memory.falls, dim=-1)  # (B, m)
        # Forgotten columns are zero; what lies below an ulp of the state is rounding.
        floor = torch.finfo(z.dtype).eps * torch.linalg.vector_norm(z.detach(), dim=-1, keepdim=True)
        empty = scale <= floor
        scale = scale.masked_fill(empty, 1.0)
        unit = memory.falls / scale[:, :, None]
        gram = unit @ unit.transpose(1, 2)
        # Parallel columns make a ridge of one ulp vanish.
        ridge = max(self.ridge, 8 * torch.finfo(r.dtype).eps)
        gram = gram + ridge * torch.eye(gram.shape[-1], dtype=r.dtype, device=r.device)
        # A one on the diagonal keeps the system regular.
        gram = gram + torch.diag_embed(empty.to(r.dtype))
        gamma, _ = torch.linalg.solve_ex(gram, unit @ r[:, :, None])
        gamma = (gamma.squeeze(-1) / scale).masked_fill(empty, 0.0)
        share = 1 - self.damping
        return z + share * r - (gamma[:, None, :] @ (memory.steps + share * memory.falls)).squeeze(1)


def _push(history: Tensor, new: Tensor, memory: int) -> Tensor:
    return torch.cat([history, new[:, None]], 1)[:, -memory:]


def _forget(rows: Tensor, history: Tensor) -> Tensor:
    return history.masked_fill(rows[:, None, None], 0.0)
