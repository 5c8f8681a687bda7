"""Anderson acceleration, one small problem a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf.solvers.base import Iterate, Memory, check_count, check_number, pick


class _Memory(NamedTuple):
    """Differences of the last points, oldest first, in units of the length of the difference of their residuals."""

    z: Tensor
    r: Tensor
    size: Tensor  # (B,): residual norm of the point before
    falls: tuple[
        Tensor, ...
    ]  # (B, n) each: differences of the residuals, of length 1; 0 where they are rounding
    moves: tuple[Tensor, ...]  # (B, n) each: differences of the plain next iterates
    used: Tensor  # (B, m): 1, and 0 for what a row has forgotten
    gram: Tensor  # (B, m, m): products of the falls in use, on the diagonal 1 and the ridge


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
        plain = now.fz.lerp(now.z, self.damping) if self.damping else now.fz
        size = torch.linalg.vector_norm(r, dim=-1)
        if memory is None:
            return plain, _Memory(now.z, r, size, (), (), r.new_empty(len(r), 0), r.new_empty(len(r), 0, 0))
        grew = size > self.restart * memory.size
        fresh = self._add(memory, now, r, size, grew)
        if now.step < self.warmup:
            return plain, fresh
        products = _products(fresh.falls, r) * fresh.used
        shares = torch.linalg.solve_ex(fresh.gram, products[:, :, None])[0].squeeze(-1)
        accelerate = ~grew & (shares.abs().sum(-1) < float("inf"))
        if self.patience:
            accelerate = accelerate & self._slow(size, memory.size, now)
        shares = pick(accelerate, shares, shares.new_zeros(()))
        for share, move in zip(shares.split(1, 1), fresh.moves, strict=True):
            plain = torch.addcmul(plain, share, move, value=-1)
        return plain, fresh

    def _slow(self, size: Tensor, before: Tensor, now: Iterate) -> Tensor:
        """Whether `patience` more plain steps would not bring the residual down to the tolerance."""
        floor = max(now.rtol, now.eps) * torch.linalg.vector_norm(now.fz, dim=-1)
        return size * (size / before).clamp(0, 1) ** self.patience > floor

    def _add(self, old: _Memory, now: Iterate, r: Tensor, size: Tensor, grew: Tensor) -> _Memory:
        """The memory with the last step in it; rows that grew forget everything."""
        step, fall = now.z - old.z, r - old.r
        length = torch.linalg.vector_norm(fall, dim=-1, keepdim=True)
        # What lies below an ulp of the state is rounding.
        floor = torch.finfo(r.dtype).eps * torch.linalg.vector_norm(now.z.detach(), dim=-1, keepdim=True)
        unit = torch.where(length > floor, length, float("inf")).reciprocal()
        fall, move = fall * unit, torch.add(step, fall, alpha=1 - self.damping) * unit
        oldest = int(len(old.falls) == self.memory)  # how many fall out
        others, one = old.falls[oldest:], torch.ones_like(unit)
        used = torch.cat((old.used[:, oldest:], one), 1).masked_fill(grew[:, None], 0.0)
        row = _products(others, fall) * used[:, :-1] if others else used[:, :0]
        # Parallel columns make a ridge of one ulp vanish; a column of zeros is regular too with this diagonal.
        ridge = max(self.ridge, 8 * torch.finfo(r.dtype).eps)
        above = torch.cat((old.gram[:, oldest:, oldest:], row[:, :, None]), 2)
        gram = torch.cat((above, torch.cat((row, one + ridge), 1)[:, None]), 1)
        return _Memory(now.z, r, size, (*others, fall), (*old.moves[oldest:], move), used, gram)


def _products(falls: tuple[Tensor, ...], v: Tensor) -> Tensor:
    """(B, m): of each difference with v. torch.bmm takes five times as long where n is some 64 and B 256."""
    return torch.stack([(fall * v).sum(-1) for fall in falls], 1)
