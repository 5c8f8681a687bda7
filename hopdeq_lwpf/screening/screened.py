"""The solver that iterates on candidates and verifies on all patterns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from hopdeq_lwpf._types import Result
from hopdeq_lwpf.forgetting import PFU, Keep, ReLU
from hopdeq_lwpf.retrieval import Retrieval, StreamedContext
from hopdeq_lwpf.retrieval.streamed import attended, finish, gather
from hopdeq_lwpf.screening.candidates import Nearby, collect, longest
from hopdeq_lwpf.screening.narrow import Candidates, Narrow, narrowed
from hopdeq_lwpf.solvers.base import Solver, check_count, check_number, pick
from hopdeq_lwpf.solvers.loop import Outcome, run
from hopdeq_lwpf.solvers.registry import choose_solver
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.view import FlatFunction, StateView

# Below so many patterns a pass costs no more than the candidates of a query.
SCREEN_FROM = 2**14
# Numbers in the candidates of all queries up to which nobody needs to ask: 16 MiB in float32, at the peak thrice that.
SCREEN_UP_TO = 2**22


def screens(f: Retrieval, x: StreamedContext) -> bool:
    """Whether the retrieval can be screened: by dot products, in one process, with a threshold that stays."""
    unit = f.forgetting
    simple = isinstance(unit, Keep) or (isinstance(unit, (ReLU, PFU)) and not unit.min_keep)
    if isinstance(unit, PFU):
        simple = simple and not unit.tracked and unit.scope == "row"
    per_pattern = x.mask is None or x.mask.ndim == 1
    return simple and per_pattern and f.similarity == "dot" and f.normalization is None and x.ranks.size == 1


@dataclass(frozen=True)
class Screened:
    """Solves a streamed retrieval on candidates; the same equilibria to the tolerance.

    What cannot be screened (see `screens`; with trace=True or autocast; states in half precision) is solved as ever.

    inner: solves the small problems, and the whole one for queries that cannot be screened; None: "auto".
    candidates: most patterns that a query keeps.
    margin: a pattern whose score is so far below the best one is no candidate: each has less than exp(-10) = 5e-5 of
        the largest weight, and together they are merged, so that only how they move is neglected.
    trust: share of |f| by which what is left out could at worst move it before a new pass is made; it decides how
        closely the way of plain iteration is followed, not how exact the equilibrium is.
    rounds: passes with new candidates, after which the whole problem is solved for those that are left.
    spread: where left-out patterns carry more of the weight, a query makes plain steps instead.
    """

    inner: Solver | None = None
    candidates: int = 64
    margin: float = 10.0
    trust: float = 0.1
    rounds: int = 6
    spread: float = 0.1

    uses_energy = False
    uses_metric = False

    def __post_init__(self) -> None:
        check_count("candidates", self.candidates, 1)
        check_number("margin", self.margin, 0.0, open_low=True)
        check_number("trust", self.trust, 0.0, 1.0, open_low=True)
        check_count("rounds", self.rounds, 1)
        check_number("spread", self.spread, 0.0, 1.0)

    def run(self, f: FlatFunction, z0: Tensor, stop: Termination, trace: bool) -> Outcome:
        """The outcome of a solve of f.f, a Retrieval, over f.x, a StreamedContext."""
        inner = self.inner or choose_solver(f, z0)
        exact = not f.autocast and f.view.dtypes[0] == f.view.work and len(z0) > 0
        streamed = isinstance(f.x, StreamedContext)
        # Where steps are recorded, watchers see nothing, and at least one step must be made.
        recording = torch.is_grad_enabled()
        if recording or trace or not exact or not streamed or not screens(cast(Retrieval, f.f), f.x):
            return run(f, z0, inner, stop, trace=trace, drop=not recording, least=int(recording))
        return _Course(self, inner, f, z0, stop).solve()


class _Course:
    """A screened solve under way; `rows` are the problems still worked on, and everything else has one row for each."""

    def __init__(
        self, options: Screened, inner: Solver, f: FlatFunction, z0: Tensor, stop: Termination
    ) -> None:
        self.options, self.inner, self.f, self.stop = options, inner, f, stop
        self.retrieval, self.x = cast(Retrieval, f.f), cast(StreamedContext, f.x)
        self.outcome = Outcome.empty(z0)
        self.rows = torch.arange(len(z0), device=z0.device)
        self.z, self.best_z = z0, z0
        self.best = torch.full_like(z0[:, 0], math.inf)
        self.scale = torch.full_like(self.best, math.nan)
        self.steps, self.evaluations = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.first = torch.zeros_like(self.rows)  # the pattern of largest score at the last pass
        self.image = z0  # f(z) at the last pass
        self.radius = longest(self.x, z0)
        self.x.look.forget(z0)

    def solve(self) -> Outcome:
        """Passes and small problems in turn, then the whole function for what is left."""
        # A plain step first: from a start far from every pattern the way is longer than candidates are good for.
        self._pass(None)
        self._step()
        for _ in range(self.options.rounds):
            if not len(self.rows):
                break
            best = (self.z * self.x.beta * gather(self.x, self.first).to(self.z)).sum(-1, keepdim=True)
            small, fit = self._pass(Nearby(best - self.options.margin, self.options.candidates))
            self._step()
            if small is not None and len(self.rows):
                if not bool(fit.any()):  # the weight is spread, and another search would be as vain
                    break
                self._solve(small, fit)
        self._finish()
        return self.outcome

    def _pass(self, near: Nearby | None) -> tuple[Candidates | None, Tensor]:
        """All patterns at z: test, and the small problems of what goes on, with whether they stand for the whole."""
        found = attended(self.retrieval, self.z, self.x, look=True, watch=near)
        assert found.first is not None
        self.image, self.first = finish(self.retrieval, self.z, found, self.x), found.first
        self.evaluations = self.evaluations + 1
        self.x.look.passes += 1
        self.x.look.remember(self.rows, self.z, found)
        ended = self._test()
        small, fit = None, ended
        if near is not None and not bool(ended.all()):
            small, mass = collect(
                self.retrieval, self.z, self.x, found, near, self.radius, self.options.trust
            )
            fit = mass <= self.options.spread
            live = (~ended).nonzero().squeeze(1)
            small, fit = narrowed(small, live), fit.index_select(0, live)
        if bool(ended.any()):
            self.x, live = self.x.select(~ended)
            for name in ("rows", "z", "image", "first", "best_z", "best", "scale", "steps", "evaluations"):
                setattr(self, name, getattr(self, name).index_select(0, live))
        return small, fit

    def _test(self) -> Tensor:
        """Enter the problems that have stopped at z; which ones have, bool."""
        stop, z = self.stop, self.z
        residual, size = (torch.linalg.vector_norm(v, dim=-1) for v in (self.image - z, self.image))
        scale = (torch.maximum(residual, size) * stop.divergence).nan_to_num(0.0, posinf=0.0)
        self.scale = torch.where(self.scale.isnan(), scale, self.scale)
        sane = residual <= self.scale
        within = (residual <= size * stop.rtol + stop.atol) & sane
        relative = residual / size.clamp_min(torch.finfo(size.dtype).tiny)
        better = relative < self.best
        self.best_z, self.best = pick(better, z, self.best_z), torch.where(better, relative, self.best)
        ended = within | ~sane | (self.steps >= stop.max_steps)
        failed = torch.where(residual.isfinite(), int(Result.DIVERGED), int(Result.NONFINITE))
        code = torch.where(sane, int(Result.MAX_STEPS), failed)
        entries = {
            "z": pick(within, z, self.best_z),
            "result": torch.where(within, int(Result.CONVERGED), code),
            "residual": torch.where(within, relative, self.best),
            "steps": self.steps,
            "evaluations": self.evaluations,
        }
        self.outcome.write(self.rows, ended, entries)
        return ended

    def _step(self) -> None:
        """The plain step."""
        self.z, self.steps = self.image, self.steps + 1

    def _solve(self, small: Candidates, fit: Tensor) -> None:
        """Go on from z on the candidates where they fit, as far as they are to be trusted."""
        rows = fit.nonzero().squeeze(1)
        left = self.stop.max_steps - int(self.steps.max())
        if not len(rows) or left < 1:
            return
        small, start, narrow = narrowed(small, rows), self.z.index_select(0, rows), Narrow(self.retrieval)
        # Half of the tolerance, so that what is left out may cost as much.
        stop = replace(self.stop, rtol=self.stop.rtol / 2, atol=self.stop.atol / 2, max_steps=left)
        f = FlatFunction(narrow, small, StateView.of(narrow, start), start.device.type)
        outcome = run(f, start, self.options.inner or choose_solver(f, start), stop)
        end = pick(outcome.z.isfinite().all(-1), outcome.z, start)
        self.z = self.z.index_copy(0, rows, end)
        self.steps = self.steps.index_add(0, rows, outcome.steps)
        self.evaluations = self.evaluations.index_add(0, rows, outcome.evaluations)

    def _finish(self) -> None:
        """What candidates cannot stand for, or have not solved in time, by the whole function from z on."""
        if len(self.rows) and int(self.steps.max()) >= self.stop.max_steps:
            self._pass(None)
        while len(self.rows):
            live = torch.zeros(len(self.outcome.z), dtype=torch.bool, device=self.rows.device)
            narrow = self.f.narrow(live.index_fill(0, self.rows, True))
            assert narrow is not None
            left = self.stop.max_steps - int(self.steps.max())
            outcome = run(narrow[0], self.z, self.inner, replace(self.stop, max_steps=left))
            self.steps, self.evaluations = self.steps + outcome.steps, self.evaluations + outcome.evaluations
            better = outcome.residual < self.best
            self.best_z = pick(better, outcome.z, self.best_z)
            self.best = torch.where(better, outcome.residual, self.best)
            within = outcome.result == int(Result.CONVERGED)
            entries = {
                "z": pick(within, outcome.z, self.best_z),
                "result": outcome.result,
                "residual": torch.where(within, outcome.residual, self.best),
                "steps": self.steps,
                "evaluations": self.evaluations,
            }
            # Each has its own steps to make, whatever the others needed before.
            short = (outcome.result == int(Result.MAX_STEPS)) & (self.steps < self.stop.max_steps)
            self.outcome.write(self.rows, ~short, entries)
            self.z = outcome.z
            for name in ("rows", "z", "best_z", "best", "steps", "evaluations"):
                setattr(self, name, getattr(self, name)[short])
