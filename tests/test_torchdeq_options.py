"""Names, options and foreign solvers of torchdeq's registry in our solves."""

import sys

import pytest
import torch
import torchdeq.solver
from problems import (
    F64,
    Map,
    normal,
)
from torch.testing import assert_close

from hopdeq_lwpf import Result, Termination, fixed_point
from hopdeq_lwpf.solvers import Picard
from hopdeq_lwpf.solvers.registry import register_solver
from hopdeq_lwpf.solvers.torchdeq import TorchDEQ
from hopdeq_lwpf.solvers.torchdeq_registry import register_with_torchdeq


def half(z, b):
    return 0.5 * z + b


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("broydn",), "broydn.*Did you mean 'broyden'"),
        (("broyden", 3), "takes no 'm'.*LBFGS_thres"),
        (("fixed_point_iter", None, 1e-3), r"takes no 'lam'.*\['tau'\]"),
        (("anderson", 1), "m must be an integer >= 2"),
        (("anderson", 2.5), "m must be an integer >= 2"),
        (("anderson", None, -1.0), "lam must be a number"),
        (("anderson", None, None, 0.0), "tau must be a number"),
        (("broyden", None, None, None, 0), "LBFGS_thres must be an integer >= 1"),
    ],
)
def test_wrong_names_and_options_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TorchDEQ(*options)


@pytest.mark.parametrize("name", ["torchdeq:broydn", "torchdeq", "torchdeq_broyden", "broyden:torchdeq"])
def test_a_misspelt_name_in_a_solve_is_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match="broyden"):
        fixed_point(Map(half), (torch.ones(2, 3),), torch.zeros(2, 3), solver=name)


def test_options_reach_their_solver():
    b, z0 = normal(3, 4), torch.zeros(3, 4, dtype=F64)
    seen = {}

    def spy(func, x0, max_iter, tol, m=6, lam=1e-4, tau=1.0, LBFGS_thres=None, **rest):  # noqa: PLR0913
        seen.update(m=m, lam=lam, tau=tau, LBFGS_thres=LBFGS_thres, tol=tol)
        for _ in range(max_iter):
            x0 = func(x0)

    torchdeq.solver.register_solver("spy", spy)
    try:
        fixed_point(
            Map(half), (b,), z0, solver=TorchDEQ("spy", m=3, lam=1e-8, tau=0.5, LBFGS_thres=7)
        ).require()
        assert seen == {"m": 3, "lam": 1e-8, "tau": 0.5, "LBFGS_thres": 7, "tol": 0.0}
        fixed_point(Map(half), (b,), z0, solver="torchdeq:spy").require()
        assert seen["m"] == 6
    finally:
        del torchdeq.solver._solvers["spy"]


def test_what_their_solvers_are_given_is_finite_and_outside_autocast():
    x = torch.tensor([[1.0], [1.5], [1.0]])

    def spy(func, x0, max_iter, **rest):
        for _ in range(max_iter):
            assert not torch.is_autocast_enabled("cpu")
            x0 = func(x0)
            assert bool(x0.isfinite().all())

    def f(z, x):
        return torch.where((z > x) & (x > 1), float("nan"), 0.5 * z + x)

    torchdeq.solver.register_solver("spy", spy)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            solution = fixed_point(f, x, torch.zeros(3, 1), solver="torchdeq:spy")
    finally:
        del torchdeq.solver._solvers["spy"]
    assert solution.result.tolist() == [0, Result.NONFINITE, 0]


def test_the_best_iterate_is_kept_although_their_anderson_overwrites_its_buffers():
    # Residuals as prescribed, call by call: the fourth is the lowest, and the next that is tested the eighth.
    sizes, seen = iter([4.0, 3.0, 2.0, 1e-3] + [5.0] * 20), []

    def f(z, x):
        seen.append(z.clone())
        return z + next(sizes) * x

    x = torch.tensor([[1.0, -1.0]], dtype=F64)
    stop = Termination(max_steps=12, check_every=4)
    with torch.no_grad():
        solution = fixed_point(f, x, torch.ones_like(x), solver=TorchDEQ("anderson", m=2), stop=stop)
    assert solution.result.tolist() == [Result.MAX_STEPS]
    assert_close(solution.value, seen[3], rtol=0, atol=0)


def test_a_registered_solver_that_stops_early_is_started_again_and_one_that_does_nothing_is_an_error():
    b, z0 = normal(3, 4), torch.zeros(3, 4, dtype=F64)
    torchdeq.solver.register_solver("one", lambda func, x0, **_: func(func(x0)))
    torchdeq.solver.register_solver("none", lambda func, x0, **_: x0)
    try:
        fixed_point(Map(half), (b,), z0, solver="torchdeq:one").require()
        with pytest.raises(RuntimeError, match="without evaluating"):
            fixed_point(Map(half), (b,), z0, solver="torchdeq:none")
    finally:
        del torchdeq.solver._solvers["one"], torchdeq.solver._solvers["none"]


def test_a_registered_name_never_begins_as_theirs_do():
    with pytest.raises(ValueError, match="torchdeq:mine.*choose another"):
        register_solver("torchdeq:mine", Picard)


def test_without_torchdeq_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    monkeypatch.setitem(sys.modules, "torchdeq.solver", None)
    for make in (lambda: TorchDEQ("broyden"), register_with_torchdeq):
        with pytest.raises(ImportError, match="pip install torchdeq"):
            make()
    with pytest.raises(ImportError, match="pip install torchdeq"):
        fixed_point(Map(half), (torch.ones(2, 3),), torch.zeros(2, 3), solver="torchdeq:broyden")
