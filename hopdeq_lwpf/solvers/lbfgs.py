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
    curvature: Tensor  # (B, 1): <s, y>, below 0 where the residual grew along s
    length: Tensor  # (B, 1): <s, s>


class _Memory(NamedTuple):
    z: Tensor
    r: Tensor
    size: Tensor  # (B,): |r|
    merit: Tensor | None  # (B,): energy, or the log of the residual where f has none; None where nobody asks
    floor: Tensor  # (B, 1): squared step below which its pair is rounding noise
    piece: Tensor | None  # (B,)
    pairs: tuple[_Pair, ...]
    accelerated: Tensor | None  # (B,) bool: rows whose last proposal was not the plain step; None: every row


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS with H0 = I and unit steps, so that without pairs it is Picard (Nocedal & Wright 2006, alg. 7.4).

    The residual f(z) - z is minus the energy's gradient in the metric of f. Only pairs of positive curvature
    enter, hence every step descends at first order and none is drawn to a saddle, as Anderson and Broyden are.
    Where the residual grows without turning, a row leaves a saddle, and takes several plain steps at once.

    Three rules keep the basin of plain iteration. A row is accelerated only once two consecutive plain
    residuals point the same way, which is when what is left is a slow approach to an attractor already chosen.
    An accelerated step that raises the energy (the residual, where f has none) is taken back, and the plain
    step from the same point is made instead. So is one that crosses a kink of f, that is a pattern forgotten
    or recalled: kinks are crossed by plain steps only, and the pairs before one are dropped.

    memory: pairs kept; the slow directions of a cluster are few, more than 4 gain nothing.
    warmup: plain steps before the first that may be accelerated.
    align: cosine between consecutive residuals from which on a row is accelerated; -1 accelerates at once.
    patience: a row is left to plain steps where so many more of them will do, as its last residuals tell.
    step_cap: longest step, in residuals: nearly singular pairs propose steps that only cost an evaluation.
    escape: by how much the residual may grow in one step of a row that leaves a saddle; 0 leaves it to plain steps,
    of which it may take hundreds.
    guard: whether steps are taken back. Off, it saves a fifth of the time and changes basins where patterns
    are forgotten.
    """

    memory: int = 4
    warmup: int = 2
    align: float = 0.99
    patience: int = 3
    step_cap: float = 30.0
    escape: float = 0.5
    guard: bool = True

    uses_metric = True

    def __post_init__(self) -> None:
        check_count("memory", self.memory, 1)
        check_count("warmup", self.warmup, 1)
        check_number("align", self.align, -1.0, 1.0)
        check_count("patience", self.patience, 0)
        check_number("step_cap", self.step_cap, 1.0)
        check_number("escape", self.escape, 0.0)

    @property
    def uses_energy(self) -> bool:
        return self.guard

    def propose(self, memory: Memory, now: Iterate) -> tuple[Tensor, Memory]:
        if now.step < self.warmup - 1:
            return now.fz, None
        r = now.fz - now.z
        size = torch.linalg.vector_norm(r, dim=-1)
        if memory is None:
            return now.fz, _first(now, r, size)
        old: _Memory = memory
        pairs = (*old.pairs, _pair(old, now, r))[-self.memory :]
        accelerated, aligned = old.accelerated, None
        if accelerated is not None:
            aligned = self._aligned(r, size, old)
            fresh = aligned & ~accelerated
            if bool(fresh.any()):
                accelerated = accelerated | (fresh & self._slow(size, old.size, now))
        new = _Memory(now.z, r, size, None, old.floor, now.piece, pairs, accelerated)
        new = self._guarded(old, new, now) if self.guard else new
        plain = None if new.accelerated is None else ~new.accelerated
        if plain is not None:
            asleep = int(torch.count_nonzero(plain))
            # Rows decide for themselves; where none is accelerated, as in easy problems, nothing more is computed.
            if asleep == len(plain):
                return new.z + new.r, new
            if not asleep:
                plain, new = None, new._replace(accelerated=None)
        if self.guard and new.merit is None:
            new = new._replace(merit=_merit(now, r))
        step = self._cap(_direction(new.r, new.pairs), new.size)
        leaving = pairs[-1].curvature < 0
        if self.escape and bool(leaving.any()):
            aligned = self._aligned(r, size, old) if aligned is None else aligned
            step = self._escape(step, r, pairs[-1], leaving.squeeze(1) & aligned)
        return new.z + (step if plain is None else pick(plain, new.r, step)), new

    def _guarded(self, old: _Memory, new: _Memory, now: Iterate) -> _Memory:
        """`new` with the steps taken back that raised the merit or crossed a kink."""
        crossed = None
        if new.piece is not None and old.piece is not None:
            crossed = new.piece != old.piece
            if bool(crossed.any()):
                new = new._replace(
                    accelerated=_but(new.accelerated, crossed), pairs=_without(crossed, new.pairs)
                )
        if old.merit is None:  # no row was accelerated
            return new
        merit = _merit(now, new.r)
        new = new._replace(merit=merit)
        worse = merit > old.merit + _slack(old, now)
        if crossed is not None:
            worse = worse | crossed
        if old.accelerated is not None:
            worse = worse & old.accelerated
        return _take_back(old, new, worse) if bool(worse.any()) else new

    def _cap(self, step: Tensor, size: Tensor) -> Tensor:
        """The step, not longer than `step_cap` residuals of length `size` (B,)."""
        limit, length = self.step_cap * size, torch.linalg.vector_norm(step, dim=-1)
        if not bool((length > limit).any()):
            return step
        return step * (limit / length.clamp_min(torch.finfo(step.dtype).tiny)).clamp_max(1.0)[:, None]

    def _escape(self, step: Tensor, r: Tensor, last: _Pair, leaving: Tensor) -> Tensor:
        """The step, longer in the rows `leaving` a saddle: where the residual grows without turning.

        Plain steps with a residual that grows by the factor 1 + growth each come to r ((1 + growth)^n - 1) / growth.
        """
        rows = leaving.nonzero().squeeze(1)
        curvature, length = last.curvature.index_select(0, rows), last.length.index_select(0, rows)
        growth = -curvature / torch.where(length > 0, length, 1.0)
        times = self.escape / growth.clamp(self.escape / self.step_cap, self.escape)
        return step.index_copy(0, rows, times * r.index_select(0, rows))

    def _aligned(self, r: Tensor, size: Tensor, old: _Memory) -> Tensor:
        """(B,) bool: whether the residual points as the one before."""
        return (r * old.r).sum(-1) > self.align * size * old.size

    def _slow(self, size: Tensor, before: Tensor, now: Iterate) -> Tensor:
        """Rows that plain steps would not finish soon, from the lengths (B,) of the last two residuals."""
        # The residual falls by size / before a step.
        soon = size * (size / before) ** self.patience
        return ~(soon <= now.rtol * torch.linalg.vector_norm(now.fz, dim=-1))


def _merit(now: Iterate, r: Tensor) -> Tensor:
    """What an accelerated step must not raise, (B,)."""
    return now.energy() if now.energy is not None else torch.linalg.vector_norm(r, dim=-1).log()


def _slack(old: _Memory, now: Iterate) -> Tensor | float:
    """By how much rounding may raise the merit: a few units in the last place, (B,)."""
    if now.energy is None:
        return math.log(2.0)  # of a residual
    assert old.merit is not None
    # 8 eps (2 |E| + |z|^2), the latter as the floor has it.
    return torch.add(old.floor[:, 0] / (2 * now.eps), old.merit.abs(), alpha=16 * now.eps)


def _first(now: Iterate, r: Tensor, size: Tensor) -> _Memory:
    """The memory before there is a pair."""
    floor = (4 * now.eps) ** 2 * now.z.square().sum(-1, keepdim=True)
    none = torch.zeros_like(size, dtype=torch.bool)
    return _Memory(now.z, r, size, None, floor, now.piece, (), none)


def _take_back(old: _Memory, new: _Memory, worse: Tensor) -> _Memory:
    """Rows in `worse` return to the point before and forget their pairs; their next step is the plain one."""
    assert old.merit is not None
    assert new.merit is not None
    rows = worse.nonzero().squeeze(1)
    return new._replace(
        z=new.z.index_copy(0, rows, old.z.index_select(0, rows)),
        r=new.r.index_copy(0, rows, old.r.index_select(0, rows)),
        size=torch.where(worse, old.size, new.size),
        merit=torch.where(worse, old.merit, new.merit),
        piece=None if old.piece is None or new.piece is None else torch.where(worse, old.piece, new.piece),
        pairs=_without(worse, new.pairs),
        accelerated=_but(new.accelerated, worse),
    )


def _but(accelerated: Tensor | None, rows: Tensor) -> Tensor:
    """The rows that are accelerated, without these."""
    return ~rows if accelerated is None else accelerated & ~rows


def _without(rows: Tensor, pairs: tuple[_Pair, ...]) -> tuple[_Pair, ...]:
    """The pairs, unused in these rows (B,)."""
    return tuple(pair._replace(rho=pair.rho.masked_fill(rows[:, None], 0.0)) for pair in pairs)


def _direction(r: Tensor, pairs: tuple[_Pair, ...]) -> Tensor:
    """H r by the two-loop recursion."""
    step, shares = r, []
    for pair in reversed(pairs):
        share = pair.rho * (pair.s_dual * step).sum(-1, keepdim=True)
        shares.append(share)
        step = torch.addcmul(step, share, pair.y, value=-1)
    for pair, share in zip(pairs, reversed(shares), strict=True):
        back = pair.rho * (pair.y_dual * step).sum(-1, keepdim=True)
        step = torch.addcmul(step, share - back, pair.s)
    return step


def _pair(old: _Memory, now: Iterate, r: Tensor) -> _Pair:
    """The pair of the last step, with rho = 0 where its curvature is not clearly positive."""
    s, y = now.z - old.z, old.r - r
    straight = now.metric is None or now.metric is identity
    s_dual, y_dual = (s, y) if straight else (now.metric(s), now.metric(y))  # type: ignore[misc]
    curvature = (s_dual * y).sum(-1, keepdim=True)
    length = (s_dual * s).sum(-1, keepdim=True)
    good = curvature > torch.add(old.floor, length, alpha=1e-5)
    rho = torch.where(good, curvature, float("inf")).reciprocal()
    return _Pair(s, y, s_dual, y_dual, rho, curvature, length)
