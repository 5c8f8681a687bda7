"""Limited-memory BFGS on the energy, one small problem a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf._types import identity
from hopdeq_lwpf.solvers.base import Iterate, Memory, check_count, check_number, pick


class _Pair(NamedTuple):
    """One secant pair. In the metric M, products are s.M y; M s and M y are stored, M of the pair's own step."""

    s: Tensor  # (B, n) step
    y: Tensor  # (B, n) fall of the residual along it
    s_dual: Tensor
    y_dual: Tensor
    rho: Tensor  # (B, 1): 1 / <s, y>, 0 where the pair is not used


class _Memory(NamedTuple):
    z: Tensor
    r: Tensor
    merit: Tensor | None  # (B,): energy, or the log of the residual where f has none; None without a guard
    slack: Tensor  # (B,): by how much rounding may raise the merit
    piece: Tensor | None
    pairs: tuple[_Pair, ...]
    accelerated: Tensor | None  # (B,) bool: the last proposal was not a plain step


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS with H0 = I and unit steps, so that without pairs it is Picard (Nocedal & Wright 2006, alg. 7.4).

    The residual f(z) - z is minus the energy's gradient in the metric of f. Only pairs of positive curvature
    enter, hence every step descends at first order and none is drawn to a saddle, as Anderson and Broyden are.

    memory: pairs kept; the slow directions of a cluster are few, 3 to 5 do not differ.
    warmup: Picard steps before the first accelerated one; they settle which basin a query falls into.
    step_cap: longest step, in residuals; keeps a poor pair from leaving the basin.
    guard: an accelerated step that raises the energy (the residual, where f has none) is taken back and the
    plain step from the same point is made instead.
    """

    memory: int = 3
    warmup: int = 2
    step_cap: float = 10.0
    guard: bool = True
    align: float = 0.95

    uses_metric = True

    def __post_init__(self) -> None:
        check_count("memory", self.memory, 1)
        check_count("warmup", self.warmup, 0)
        check_number("step_cap", self.step_cap, 1.0)

    @property
    def uses_energy(self) -> bool:
        return self.guard

    def propose(self, memory: Memory, now: Iterate) -> tuple[Tensor, Memory]:
        if now.step < self.warmup - 1:
            return now.fz, None
        r = now.fz - now.z
        merit = self._merit(now, r)
        if memory is None:
            none = torch.zeros_like(r[:, 0], dtype=torch.bool)
            return now.fz, _Memory(now.z, r, merit, _slack(now, merit), now.piece, (), none)
        pair = _pair(memory, now, r)
        dot = (r * memory.r).sum(-1)
        aligned = dot > self.align * (
            torch.linalg.vector_norm(r, dim=-1) * torch.linalg.vector_norm(memory.r, dim=-1)
        )
        started = memory.accelerated | aligned
        pairs = memory.pairs
        worse = None
        if merit is not None:
            worse = memory.accelerated & (merit > memory.merit + memory.slack)
        if now.piece is not None:
            moved = now.piece != memory.piece
            worse = worse | (memory.accelerated & moved)
            if bool(moved.any()):
                started = started & ~moved
                keep = (~moved)[:, None].to(r.dtype)
                pairs = tuple(p._replace(rho=p.rho * keep) for p in pairs)
                pair = pair._replace(rho=pair.rho * keep)
        pairs = (*pairs, pair)[-self.memory :]
        fresh = _Memory(now.z, r, merit, memory.slack, now.piece, pairs, started)
        if worse is not None:
            if bool(worse.any()):
                return self._take_back(memory, fresh, worse)
        return now.z + pick(started, self._step(r, pairs), r), fresh

    def _merit(self, now: Iterate, r: Tensor) -> Tensor | None:
        """What an accelerated step must not raise; half the log of the residual may double."""
        if not self.guard:
            return None
        return now.energy if now.energy is not None else torch.linalg.vector_norm(r, dim=-1).log()

    def _take_back(self, old: _Memory, new: _Memory, worse: Tensor) -> tuple[Tensor, _Memory]:
        """Rows in `worse` return to the point before, forget their pairs and make the plain step from there."""
        assert old.merit is not None
        assert new.merit is not None
        step = pick(worse, old.r, pick(new.accelerated, self._step(new.r, new.pairs), new.r))
        z = pick(worse, old.z, new.z)
        keep = (~worse)[:, None].to(z.dtype)
        kept = _Memory(
            z,
            pick(worse, old.r, new.r),
            torch.where(worse, old.merit, new.merit),
            new.slack,
            None if new.piece is None else torch.where(worse, old.piece, new.piece),
            tuple(pair._replace(rho=pair.rho * keep) for pair in new.pairs),
            new.accelerated & ~worse,
        )
        return z + step, kept

    def _step(self, r: Tensor, pairs: tuple[_Pair, ...]) -> Tensor:
        """The two-loop recursion, and the cap on its length."""
        step, shares = r, []
        for pair in reversed(pairs):
            share = pair.rho * (pair.s_dual * step).sum(-1, keepdim=True)
            shares.append(share)
            step = torch.addcmul(step, share, pair.y, value=-1)
        for pair, share in zip(pairs, reversed(shares), strict=True):
            back = pair.rho * (pair.y_dual * step).sum(-1, keepdim=True)
            step = torch.addcmul(step, share - back, pair.s)
        length = torch.linalg.vector_norm(step, dim=-1, keepdim=True)
        cap = self.step_cap * torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        # 0 / 0 at an exact fixed point: the clamp turns NaN-free zeros into a zero step.
        return step * (cap / length.clamp_min(torch.finfo(r.dtype).tiny)).clamp_max(1.0)


def _slack(now: Iterate, merit: Tensor | None) -> Tensor:
    """What rounding may add to the merit: eight units in the last place of its terms; log 2 for residuals."""
    if now.energy is None or merit is None:
        return torch.full_like(now.z[:, 0], math.log(2.0))
    return 8 * now.eps * (2 * merit.abs() + now.z.square().sum(-1))


def _pair(memory: _Memory, now: Iterate, r: Tensor) -> _Pair:
    """The pair of the last step, with rho = 0 where its curvature is not clearly positive."""
    s, y = now.z - memory.z, memory.r - r
    straight = now.metric is None or now.metric is identity
    s_dual, y_dual = (s, y) if straight else (now.metric(s), now.metric(y))
    curvature = (s_dual * y).sum(-1, keepdim=True)
    length_s = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    length_y = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    # Below a few ulp of z, y is rounding noise.
    floor = 4 * torch.finfo(s.dtype).eps * torch.linalg.vector_norm(now.z, dim=-1, keepdim=True)
    good = (curvature > 1e-5 * length_s * length_y) & (length_s > floor)
    return _Pair(s, y, s_dual, y_dual, good / curvature.masked_fill(~good, 1.0))
