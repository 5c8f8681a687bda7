"""Retrieval problems as the rows use them, and what a solve of one is worth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.basins import reference
from benchmarks.peers import residual
from benchmarks.problems import PROBLEMS, RetrievalProblem
from benchmarks.suite.row import Case, Found
from benchmarks.suite.sizes import SIZES
from hopdeq_lwpf._types import Solution
from hopdeq_lwpf.diagnostics import basin_changed
from hopdeq_lwpf.forgetting import Keep
from hopdeq_lwpf.retrieval import Retrieval, RetrievalContext
from hopdeq_lwpf.solvers import Solver, Termination, fixed_point

MAX_STEPS = 2000
NAMES = {torch.float32: "float32", torch.float64: "float64"}


@functools.cache
def problem(name: str) -> RetrievalProblem:
    """The problem with as many queries as the suite asks."""
    whole = PROBLEMS[name]()
    return RetrievalProblem(name, whole.patterns, whole.query[: SIZES.queries], whole.beta, whole.forgetting)


@functools.cache
def limit(name: str) -> Solution:
    """Where plain iteration in float64 takes the queries of a problem."""
    return reference(problem(name))


@dataclass(frozen=True)
class Setting:
    """A problem in one precision on one device, laid out."""

    name: str
    dtype: torch.dtype
    tolerance: float
    f: Retrieval
    x: RetrievalContext
    z0: Tensor

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, tolerance: float, device: str = "cpu") -> Setting:
        given = problem(name)
        f = Retrieval(given.beta, forgetting=given.forgetting).to(device)
        x = f.prepare(given.query.to(device, dtype), given.patterns.to(device, dtype))
        return cls(name, dtype, tolerance, f, x, f.init(x))

    def case(self, group: str, method: str) -> Case:
        n, d = self.x.patterns.shape
        return Case(group, self.name, method, n, len(self.z0), d, NAMES[self.dtype], self.tolerance)

    def image(self, z: Tensor) -> Tensor:
        """f without gradient."""
        with torch.no_grad():
            return self.f(z, self.x)

    def solve(self, solver: str | Solver, stop: Termination | None = None) -> Solution:
        """As a user calls it."""
        stop = stop or Termination(rtol=self.tolerance, max_steps=MAX_STEPS)
        with torch.no_grad():
            return fixed_point(self.f, self.x, self.z0, solver=solver, stop=stop)

    def judge(self, state: Tensor, steps: float, evaluations: float, products: float = 0.0) -> Found:
        """What a returned state is worth."""
        worst = float(residual(self.image, state).nan_to_num(1e9).max())
        moved = int(basin_changed(state.detach().cpu(), limit(self.name)).sum())
        return Found(steps, evaluations, worst, products, moved, len(state))


def counts(solution: Solution) -> tuple[float, float]:
    """Steps of the slowest query, evaluations of the mean one."""
    return float(solution.steps.max()), float(solution.evaluations.double().mean())


def plain_loop(f: Callable[[Tensor], Tensor], z: Tensor, tolerance: float) -> Tensor:
    """What one would write without a solver: f again and again, tested after every step."""
    for _ in range(MAX_STEPS):
        image = f(z)
        if bool(((image - z).norm(dim=-1) <= tolerance * image.norm(dim=-1)).all()):
            break
        z = image
    return z


def written_out(setting: Setting) -> Callable[[Tensor], Tensor]:
    """f in plain PyTorch: the two lines of attention, and the two of forgetting."""
    patterns, beta, unit = setting.x.patterns, setting.x.beta, setting.f.forgetting

    def f(z: Tensor) -> Tensor:
        value, kept = unit(beta * z @ patterns.T)
        return (kept * torch.softmax(value, -1)) @ patterns

    def attention(z: Tensor) -> Tensor:
        return torch.softmax(beta * z @ patterns.T, -1) @ patterns

    return attention if isinstance(unit, Keep) else f
