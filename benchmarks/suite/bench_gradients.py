"""Forward and backward together: milliseconds beside the error of the gradient with respect to the patterns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdeq import get_deq

from benchmarks.gradients import loss, solved_gradient, target_of
from benchmarks.suite.measure import Calls, Counted, Measure
from benchmarks.suite.row import Found
from benchmarks.suite.settings import MAX_STEPS, Setting, counts, limit, plain_loop, problem, written_out
from benchmarks.suite.sizes import SIZES
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.solvers import Implicit, Termination, Unrolled, fixed_point

TOLERANCE = 1e-5
PEERS: dict[str, dict[str, object]] = {
    f"torchdeq {forward} + Broyden": {
        "ift": True, "f_solver": solver, "b_solver": "broyden", "f_stop_mode": "rel", "b_stop_mode": "rel",
        "f_tol": TOLERANCE, "b_tol": TOLERANCE, "f_max_iter": 600, "b_max_iter": 600,
    }
    for forward, solver in (("fixed point", "fixed_point_iter"), ("Broyden", "broyden"))
}  # fmt: skip
# As it comes (at most 40 iterations, the gradient of one step), and with its implicit gradient.
PEERS |= {"torchdeq defaults": {}, "torchdeq defaults, implicit": {"ift": True}}
DEFAULT = "implicit, CG (default)"
OURS = {DEFAULT: Implicit(), "unrolled": Unrolled()}
Solve = Callable[[Callable[[Tensor], Tensor]], Tensor]


@functools.cache
def _exact(name: str) -> Tensor:
    given = problem(name)
    f = Retrieval(given.beta, forgetting=given.forgetting)
    patterns = given.patterns.clone().requires_grad_()
    adjoint = Implicit(rtol=1e-13, max_steps=500)
    return solved_gradient(f, given.query, patterns, target_of(given.query), 1e-13, adjoint)


def _leaves(name: str) -> tuple[Setting, Tensor]:
    """The problem with patterns that require grad."""
    setting = Setting.of(name, torch.float32, TOLERANCE)
    patterns = setting.x.patterns.clone().requires_grad_()
    return dataclasses.replace(setting, x=setting.x._replace(patterns=patterns)), patterns


def _deq_solve(deq: Any, z0: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    state: Tensor = deq(f, z0)[0][-1]
    return state


def _peer_solves(setting: Setting) -> dict[str, Solve]:
    solves: dict[str, Solve] = {"plain loop, autograd": lambda f: plain_loop(f, setting.z0, TOLERANCE)}
    for name, options in PEERS.items():
        solves[name] = partial(_deq_solve, get_deq(**options), setting.z0)
    return solves


def _product(setting: Setting, target: Tensor) -> Callable[[], object]:
    """J^T target, of a graph that is kept."""
    z = setting.z0.clone().requires_grad_()
    image = setting.f(z, setting.x)
    return lambda: torch.autograd.grad(image, z, target, retain_graph=True)


@pytest.mark.parametrize("method", [*OURS, "plain loop, autograd", *PEERS])
@pytest.mark.parametrize("name", SIZES.gradients)
def bench_gradients(measure: Measure, name: str, method: str) -> None:
    setting, patterns = _leaves(name)
    target = target_of(setting.z0)
    exact = _exact(name)

    def ours(adjoint: Any) -> tuple[Tensor, Any]:
        stop = Termination(rtol=TOLERANCE, max_steps=MAX_STEPS)
        solution = fixed_point(setting.f, setting.x, setting.z0, stop=stop, adjoint=adjoint)
        return torch.autograd.grad(loss(solution.value, target), patterns)[0], solution

    def theirs(solve: Solve, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        state = solve(f)
        return torch.autograd.grad(loss(state, target), patterns)[0], state

    def judge(result: tuple[Tensor, Any]) -> Found:
        gradient, solution = result
        if method in OURS:
            state, (steps, evaluations) = solution.state, counts(solution)
            # The equilibrium is evaluated once more to attach the gradient, and one product leads to the patterns.
            implicit = solution.adjoint is not None
            products = float(solution.adjoint.steps.double().mean()) + 1 if implicit else evaluations
            found = setting.judge(state, steps, evaluations + implicit, products)
        else:
            found = setting.judge(solution, counted.evaluations, counted.evaluations, counted.products)
        error = float((gradient.double() - exact).norm() / exact.norm())
        return dataclasses.replace(found, gradient_error=error)

    if method in OURS:
        call = partial(ours, OURS[method])
    else:
        solve = _peer_solves(setting)[method]
        f = written_out(setting) if method.startswith("plain") else partial(setting.f.forward, x=setting.x)
        counted = Counted(f, len(setting.z0))
        try:
            theirs(solve, counted)
        except (RuntimeError, torch.linalg.LinAlgError) as error:
            pytest.skip(f"raises {type(error).__name__}")
        call = partial(theirs, solve, f)
    limit(name)
    calls = Calls(
        call,
        lambda: setting.image(setting.z0),
        product=_product(setting, target),
        beside=None if method == DEFAULT else partial(ours, OURS[DEFAULT]),
    )
    measure(setting.case("forward and backward", method), calls, judge)
