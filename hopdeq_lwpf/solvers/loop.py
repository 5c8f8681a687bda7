"""The one loop: it evaluates, tests, records, drops and traces. Solvers only propose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hopdeq_lwpf._types import Result, Trace
from hopdeq_lwpf.solvers.base import Deferred, Iterate, Memory, Solver, pick, take
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.view import FlatFunction

# Re-packing costs a tenth of an evaluation and some four follow before the next test. Of a handful of rows it costs
# more than that where patterns are few, but where they are many an evaluation still costs by the row: by halves.
DROP_BELOW = 0.9
HANDFUL, DROP_FEW_BELOW = 8, 0.5


@dataclass
class Outcome:
    """The flat result of a solve, one row a problem; filled as problems stop."""

    z: Tensor  # (B, n)
    result: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: Tensor
    trace: Trace | None = None

    @classmethod
    def empty(cls, z: Tensor) -> Outcome:
        batch, device = z.shape[:1], z.device
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        residual = torch.full(batch, float("nan"), dtype=z.dtype, device=device)
        return cls(z, torch.full_like(count, int(Result.MAX_STEPS)), residual, count, count)

    def write(self, rows: Tensor | None, stopped: Tensor, entries: dict[str, Tensor]) -> None:
        """Enter the problems in `stopped`; `rows` maps working rows to problems (None: one to one)."""
        if rows is not None:
            here = stopped.nonzero().squeeze(1)
            there = rows.index_select(0, here)
        for name, value in entries.items():
            old = getattr(self, name)
            if rows is not None:
                new = old.index_copy(0, there, value.index_select(0, here))
            else:
                new = pick(stopped, value, old) if value.ndim > 1 else torch.where(stopped, value, old)
            setattr(self, name, new)


@dataclass
class Verdict:
    """What a test found, one entry a row."""

    residual: Tensor  # |f(z) - z|
    relative: Tensor  # |f(z) - z| / |f(z)|, 0 where both are
    within: Tensor  # bool: the tolerance is met
    sane: Tensor  # bool: finite, not diverged, and where f is to be trusted
    goes_on: Tensor  # bool

    def code(self) -> Tensor:
        """`Result` codes, int64."""
        finite = self.residual < float("inf")
        failed = torch.where(finite, int(Result.DIVERGED), int(Result.NONFINITE))
        ended = torch.where(self.sane, int(Result.MAX_STEPS), failed)
        return torch.where(self.within, int(Result.CONVERGED), ended)


@dataclass
class _Work:
    """The rows still worked on."""

    f: FlatFunction
    z: Tensor
    live: Tensor  # (B',) bool; rows that have stopped ride along until they are dropped
    best_z: Tensor
    best: Tensor  # (B',): lowest relative residual seen at a test
    remaining: int
    memory: Memory = None
    rows: Tensor | None = None  # the problem of each row; None: all, in order
    scale: Tensor | None = None  # (B',): what divergence is measured against

    @classmethod
    def start(cls, f: FlatFunction, z: Tensor) -> _Work:
        best = torch.full(z.shape[:1], float("inf"), dtype=z.dtype, device=z.device)
        return cls(f, z, best > 0, z, best, z.shape[0])

    def drop(self) -> Tensor | None:
        """Re-pack when enough rows have stopped and f can be narrowed; the rows that stay, or None."""
        current = self.z.shape[0]
        most = (DROP_FEW_BELOW if current < HANDFUL else DROP_BELOW) * current
        if self.remaining > most:
            return None
        narrowed = self.f.narrow(self.live)
        if narrowed is None or narrowed[1].shape[0] > most:
            return None
        self.f, keep = narrowed
        self.rows = keep if self.rows is None else self.rows.index_select(0, keep)
        for name in ("z", "live", "best_z", "best", "memory", "scale"):
            setattr(self, name, take(getattr(self, name), keep))
        return keep

    @torch.no_grad()
    def judge(self, fz: Tensor, stop: Termination, last: bool) -> Verdict:
        """The state of every row at its iterate z."""
        z, fz = self.z.detach(), fz.detach()
        residual = torch.linalg.vector_norm(fz - z, dim=-1)
        size = torch.linalg.vector_norm(fz, dim=-1)
        if self.scale is None:
            # Finite, so that a residual that is not, or whose norm overflows, exceeds it.
            scale = torch.maximum(residual, size) * stop.divergence
            self.scale = scale.nan_to_num(0.0, posinf=0.0)
        sane = residual <= self.scale
        relative = residual / size.clamp_min(torch.finfo(size.dtype).tiny)
        trusted = self.f.trusted(z)
        if trusted is not None:
            sane, relative = sane & trusted, relative.masked_fill(~trusted, float("inf"))
        within = (residual <= size * stop.rtol + stop.atol) & sane
        goes_on = torch.zeros_like(sane) if last else self.live & sane & ~within
        return Verdict(residual, relative, within, sane, goes_on)


class Course:
    """A solve under way: it evaluates f at the iterates that a solver proposes, tests, records and traces."""

    def __init__(
        self,
        f: FlatFunction,
        z0: Tensor,
        stop: Termination,
        *,
        trace: bool = False,
        energy: bool = False,
        least: int = 0,
    ) -> None:
        self.stop = stop
        self.least = least
        self.step = 0
        self.outcome = Outcome.empty(z0)
        self.history = _History(f.has_energy, z0.shape[0]) if trace else None
        self.work = _Work.start(f, z0)
        self.want_energy = f.has_energy and (energy or trace)

    @property
    def ended(self) -> bool:
        """Whether every problem has stopped."""
        return not self.work.remaining

    def evaluate(self) -> tuple[Tensor, Deferred | None, Tensor | None]:
        """f, energy and piece at `work.z`; the next evaluation belongs to the next step."""
        work = self.work
        fz, energy, piece = work.f.evaluate(work.z) if self.want_energy else (work.f(work.z), None, None)
        if self.history is not None:
            self.history.add(work, fz, None if energy is None else energy())
        if self.stop.checks(self.step):
            _test(work, self.outcome, fz, self.stop, self.step, early=self.step < self.least)
        self.step += 1
        return fz, energy, piece

    def finish(self) -> Outcome:
        """The outcome, with its trace where one was asked for."""
        if self.history is not None:
            self.outcome.trace = self.history.finish(self.work.f, self.outcome.z)
        return self.outcome


def run(
    f: FlatFunction,
    z0: Tensor,
    solver: Solver,
    stop: Termination,
    *,
    trace: bool = False,
    drop: bool = True,
    least: int = 0,
) -> Outcome:
    """Iterate `solver` on f from z0 (B, n) until every problem has stopped.

    With gradients enabled every operation is recorded (nothing is done in place); pass `drop=False` then, and
    `least=1`: an iterate that passes after so many updates only, since a start depends on nothing.
    A solver that has `run(f, z0, stop, trace) -> Outcome` in place of `propose`, such as another library's,
    brings its own loop.
    """
    if not hasattr(solver, "propose"):
        return cast(Any, solver).run(f, z0, stop, trace)
    course = Course(f, z0, stop, trace=trace, energy=solver.uses_energy, least=least)
    while not course.ended:
        _advance(course, solver, drop)
    return course.finish()


def _advance(course: Course, solver: Solver, drop: bool) -> None:
    """One evaluation and, unless every problem has stopped, the next iterate.

    A function of its own, so that what an energy is made from, several times the state, is freed before the next
    evaluation asks for as much again.
    """
    work, step = course.work, course.step
    fz, energy, piece = course.evaluate()
    if course.ended:
        return
    keep = work.drop() if drop and course.stop.checks(step) else None
    if keep is not None:
        fz, piece = take((fz, piece), keep)
        energy = None if energy is None else energy.take(keep)
    metric = work.f.metric(work.z) if solver.uses_metric else None
    now = Iterate(step, work.z, fz, energy, piece, metric, work.f.eps, course.stop.rtol)
    with work.f.full_precision():
        work.z, work.memory = solver.propose(work.memory, now)


def _test(work: _Work, outcome: Outcome, fz: Tensor, stop: Termination, step: int, *, early: bool) -> None:
    """Judge every row, keep the best iterate of each, and record those that stop; early: none may converge yet."""
    verdict = work.judge(fz, stop, last=step >= stop.max_steps)
    if early:
        verdict.goes_on = work.live & verdict.sane
        verdict.within = torch.zeros_like(verdict.sane)
    relative = verdict.relative
    better = relative < work.best
    stopped = work.live ^ verdict.goes_on
    work.live = verdict.goes_on
    # One look at the device for both.
    counts = torch.stack((work.live.count_nonzero(), better.count_nonzero())).tolist()
    before, work.remaining = work.remaining, counts[0]
    if counts[1] == len(better):
        work.best_z, work.best = work.z, relative
    else:
        work.best_z, work.best = pick(better, work.z, work.best_z), torch.where(better, relative, work.best)
    if work.remaining == before:
        return
    code = verdict.code()
    count = torch.full_like(code, step)
    outcome.write(
        work.rows,
        stopped,
        {
            "z": pick(verdict.within, work.z, work.best_z),
            "result": code,
            "residual": torch.where(verdict.within, relative, work.best),
            "steps": count,
            "evaluations": count + 1,
        },
    )


class _History:
    """Residuals and energies of every evaluation, NaN for problems that have stopped."""

    def __init__(self, has_energy: bool, batch: int) -> None:
        self.has_energy = has_energy
        self.batch = batch
        self.residuals: list[Tensor] = []
        self.energies: list[Tensor] = []

    @torch.no_grad()
    def add(self, work: _Work, fz: Tensor, energy: Tensor | None) -> None:
        size = torch.linalg.vector_norm(fz, dim=-1).clamp_min(torch.finfo(fz.dtype).tiny)
        self.residuals.append(self._spread(work, torch.linalg.vector_norm(fz - work.z, dim=-1) / size))
        if energy is not None:
            self.energies.append(self._spread(work, energy))

    def _spread(self, work: _Work, values: Tensor) -> Tensor:
        values = values.detach().masked_fill(~work.live, float("nan"))
        if work.rows is None:
            return values
        return values.new_full((self.batch,), float("nan")).index_copy(0, work.rows, values)

    def finish(self, f: FlatFunction, z: Tensor) -> Trace:
        """(T, *batch) tensors."""
        batch = f.view.batch_shape

        def stack(rows: list[Tensor]) -> Tensor:
            return torch.stack(rows).reshape(-1, *batch) if rows else z.new_zeros((0, *batch))

        return Trace(stack(self.residuals), stack(self.energies) if self.has_energy else None)
