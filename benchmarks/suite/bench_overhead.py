"""What the loop costs over evaluations of f alone, before any query is dropped: a solve, and a step where f is tiny."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from benchmarks.suite.measure import Calls, Measure
from benchmarks.suite.row import Found, Target
from benchmarks.suite.settings import Setting, counts
from benchmarks.suite.sizes import IS_QUICK, SIZES
from hopdeq_lwpf._types import Solution
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.solvers import Termination

# Steps fewer than the solver needs.
STEPS = {"picard": 60, "auto": 16, "anderson": 12, "broyden": 12}
TINY = ((1, 8, 8), (8, 32, 16))  # B, N, d
RATE = 0.97  # contraction of the tiny problems


def _tiny(size: tuple[int, int, int]) -> Setting:
    """Patterns around 0, which plain iteration approaches by a factor of RATE a step."""
    queries, count, width = size
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(count, width, generator=generator)
    patterns -= patterns.mean(0)
    beta = RATE * count / float(torch.linalg.eigvalsh(patterns.T @ patterns)[-1])
    f = Retrieval(beta)
    x = f.prepare(0.02 * torch.randn(queries, width, generator=generator), patterns)
    return Setting("tiny", torch.float32, 0.0, f, x, f.init(x))


def _measure(measure: Measure, setting: Setting, solver: str, target: Target) -> None:
    stop = Termination(rtol=0.0, atol=0.0, max_steps=6 if IS_QUICK else STEPS[solver])

    def judge(solution: Solution) -> Found:
        steps, evaluations = counts(solution)
        return Found(steps, evaluations, float(solution.residual.max()))

    case = dataclasses.replace(setting.case("overhead", solver), tolerance=None)
    z0, f, x = setting.z0, setting.f, setting.x
    calls = Calls(partial(setting.solve, solver, stop), torch.no_grad()(partial(f, z0, x)))
    measure(case, calls, judge, (target,))


@pytest.mark.parametrize("solver", STEPS)
def bench_loop(measure: Measure, solver: str) -> None:
    most = 0.1 if solver == "picard" else 0.3
    setting = Setting.of(SIZES.overhead, torch.float32, 0.0)
    _measure(measure, setting, solver, Target("overhead", most))


@pytest.mark.parametrize("size", TINY, ids=str)
@pytest.mark.parametrize("solver", STEPS)
def bench_tiny(measure: Measure, solver: str, size: tuple[int, int, int]) -> None:
    most = 30 if solver == "picard" else 200
    _measure(measure, _tiny(size), solver, Target("step_us", most))
