"""Our solvers behind torchdeq's interface."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torchdeq.solver
from problems import (
    F64,
    PROBLEMS,
    exact_gradients,
    fresh,
    loss_of,
    normal,
    relative_error,
    solve,
)
from torch.testing import assert_close
from torchdeq import get_deq

from hopdeq_lwpf import Result, Termination, fixed_point
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import LBFGS, Phantom
from hopdeq_lwpf.solvers.registry import register_solver
from hopdeq_lwpf.solvers.torchdeq_registry import Bound, register_with_torchdeq, solve_for_torchdeq

OURS = ("picard", "anderson", "broyden", "lbfgs", "auto")
CORES = ("sliced", "indexing")


def contraction(rows: int = 4, width: int = 5, rate: float = 0.6):
    """z = tanh(W z + x) with |W| = rate: the function, W and x."""
    w = rate * torch.linalg.qr(normal(width, width))[0]
    return (lambda z, w, x: torch.tanh(z @ w.T + x)), w, normal(rows, width, seed=2)


OURS_FIRST = "import hopdeq_lwpf.solvers.torchdeq_registry, sys; assert 'torchdeq' not in sys.modules"
ORDERS = {
    "ours first": f"{OURS_FIRST}; import torchdeq",
    "ours first, then their solvers": f"{OURS_FIRST}; import torchdeq.solver",
    "theirs first": "import torchdeq; import hopdeq_lwpf.solvers.torchdeq_registry",
}


@pytest.mark.parametrize("order", ORDERS)
def test_our_names_are_there_in_either_order_of_import(order):
    code = f"{ORDERS[order]}\nfrom torchdeq import get_deq\nprint(get_deq(f_solver='hopdeq_lbfgs').f_solver.args)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('lbfgs',)"


def test_registering_again_is_harmless_and_a_taken_name_is_an_error():
    names = register_with_torchdeq()
    assert set(names) >= {f"hopdeq_{name}" for name in OURS}
    before = dict(torchdeq.solver._solvers)
    assert register_with_torchdeq() == names
    assert torchdeq.solver._solvers == before
    torchdeq.solver._solvers["hopdeq_picard"] = len
    try:
        with pytest.raises(ValueError, match="hopdeq_picard"):
            register_with_torchdeq()
    finally:
        torchdeq.solver._solvers["hopdeq_picard"] = before["hopdeq_picard"]


TIGHTLY = {
    **{"f_max_iter": 300, "f_tol": 1e-12, "f_stop_mode": "rel"},
    **{"b_max_iter": 300, "b_tol": 1e-12, "b_stop_mode": "rel"},
}


def deq_for(solver: str, **options):
    """torchdeq's module with our solver both ways, solved tightly."""
    solvers = {"f_solver": f"hopdeq_{solver}", "b_solver": f"hopdeq_{solver}"}
    return get_deq(**{**TIGHTLY, **solvers, **options})


@pytest.mark.parametrize("how", ["ift", "hook_ift"])
@pytest.mark.parametrize("n_states", [1, 3])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("solver", OURS)
def test_get_deq_trains_with_ours_in_both_cores(solver, core, n_states, how):
    known = PROBLEMS["tanh"]
    w, b = fresh(known)
    deq = deq_for(solver, core=core, n_states=n_states, **{how: True})
    states, info = deq(lambda z: known.f(z, (w, b)), known.z0)
    assert len(states) == n_states
    assert_close(states[-1], known.root, rtol=1e-10, atol=1e-10)
    assert info["result"].tolist() == [0, 0, 0]
    found = torch.autograd.grad(loss_of(states[-1]), (w, b))
    # torchdeq's own tail: the state after the last of f at z* is off by the residual.
    assert relative_error(found, exact_gradients(known)) < 1e-9


@pytest.mark.parametrize("core", CORES)
def test_early_convergence_keeps_the_implicit_gradient_where_torchdeq_falls_back_to_one_step(core):
    known = PROBLEMS["tanh"]
    errors = {}
    for solver in ("fixed_point_iter", "hopdeq_picard"):
        w, b = fresh(known)
        deq = deq_for("picard", core=core, n_states=3, ift=True, f_solver=solver)
        states, _ = deq(lambda z, w=w, b=b: known.f(z, (w, b)), known.z0)
        errors[solver] = relative_error(
            torch.autograd.grad(loss_of(states[-1]), (w, b)), exact_gradients(known)
        )
    assert errors["hopdeq_picard"] < 1e-9
    # The reason for the test: in the indexing core theirs returns too few states.
    assert (errors["fixed_point_iter"] > 0.1) == (core == "indexing")


@pytest.mark.parametrize(("k", "tau"), [(1, 1.0), (5, 0.5), (3, 0.8)])
def test_our_phantom_gradient_is_torchdeqs(k, tau):
    known = PROBLEMS["tanh"]
    w, b = fresh(known)
    deq = deq_for("picard", ift=False, grad=k, tau=tau, f_tol=1e-14)
    states, _ = deq(lambda z: known.f(z, (w, b)), known.z0)
    theirs = torch.autograd.grad(loss_of(states[-1]), (w, b))
    solution = solve(known, (w, b), solver="picard", adjoint=Phantom(k, 1 - tau))
    ours = torch.autograd.grad(loss_of(solution.value), (w, b))
    # Both start within 1e-13 of the equilibrium.
    assert relative_error(ours, theirs) < 1e-10


def slow_picard(steps: int):
    """z = cos z from 0 and 1: iterates and their absolute and relative residuals, in plain Python."""
    columns = []
    for z in (0.0, 1.0):
        states, absolute, relative = [], [], []
        for _ in range(steps + 1):
            states.append(z)
            absolute.append(abs(math.cos(z) - z))
            relative.append(abs(math.cos(z) - z) / abs(math.cos(z)))
            z = math.cos(z)
        columns.append((states, absolute, relative))
    return columns


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_the_statistics_are_those_of_the_plain_python_iteration(stop_mode):
    tol, steps = 1e-3, 40
    x0 = torch.tensor([[0.0], [1.0]], dtype=F64)
    z, _, info = solve_for_torchdeq("picard", torch.cos, x0, max_iter=steps, tol=tol, stop_mode=stop_mode)
    assert info["abs_trace"].shape == info["rel_trace"].shape == (2, steps + 1)
    for i, (states, absolute, relative) in enumerate(slow_picard(steps)):
        judged = absolute if stop_mode == "abs" else relative
        stop = next(t for t, value in enumerate(judged) if value <= tol)
        assert int(info["nstep"][i]) == stop
        assert int(info["evaluations"][i]) == stop + 1
        assert_close(float(z[i]), states[stop])
        for name, values in (("abs", absolute), ("rel", relative)):
            filled = values[:stop] + [values[stop]] * (steps + 1 - stop)
            assert_close(info[f"{name}_trace"][i], torch.tensor(filled, dtype=F64), rtol=1e-9, atol=1e-14)
            assert_close(float(info[f"{name}_lowest"][i]), values[stop], rtol=1e-9, atol=1e-14)
    assert info["result"].tolist() == [0, 0]


def test_an_unconverged_problem_returns_its_best_state_with_its_numbers():
    # The root is 1 and every step goes further from it, so the start is the best state.
    x0 = torch.full((1, 2), 1.01, dtype=F64)
    z, _, info = solve_for_torchdeq("picard", lambda z: 2.2 - 1.2 * z, x0, max_iter=7, tol=1e-6)
    assert_close(z, x0)
    assert info["result"].tolist() == [Result.MAX_STEPS]
    assert info["nstep"].tolist() == [0.0]
    assert_close(info["abs_lowest"], torch.full((1,), 0.022 * 2**0.5, dtype=F64))
    assert info["evaluations"].tolist() == [8]


def test_their_trajectory_is_the_best_state_up_to_each_step():
    x0 = torch.tensor([[0.0], [1.0]], dtype=F64)
    indexing = [2, 5, 30]
    z, trajectory, info = solve_for_torchdeq(
        "picard", torch.cos, x0, max_iter=30, tol=1e-3, indexing=indexing
    )
    assert len(trajectory) == 3
    for i, (states, absolute, relative) in enumerate(slow_picard(30)):
        stop = int(info["nstep"][i])
        for state, step in zip(trajectory, indexing, strict=True):
            upto = min(step, stop)
            best = stop if step >= stop else min(range(upto + 1), key=lambda t: relative[t])
            assert_close(float(state[i]), states[best])
            assert absolute[best] == min(absolute[: upto + 1])
    assert_close(trajectory[-1], z)


def test_a_bound_function_shows_its_energy_and_drops_what_has_stopped():
    patterns = normal(12, 5)
    query = torch.cat([patterns + 1e-3, patterns[:8].roll(1, 0) + 0.5 * normal(8, 5, seed=3)])
    f = Retrieval(3.0)
    x = f.prepare(query, patterns)
    stop = Termination(rtol=1e-8, atol=1e-17, max_steps=300, check_every=1)
    expected = fixed_point(f, x, query, solver="lbfgs", stop=stop)
    z, _, info = solve_for_torchdeq("lbfgs", Bound(f, x), query, 300, 1e-8, "rel")
    assert_close(z, expected.value, rtol=0, atol=0)
    assert torch.equal(info["result"], expected.result)
    assert torch.equal(info["nstep"].long(), expected.steps)
    assert_close(info["rel_lowest"], expected.residual)
    again, _, second = solve_for_torchdeq("auto", Bound(f, x), query, 300, 1e-8, "rel")
    assert_close(again, z, rtol=0, atol=0)
    rows = []

    class Watched(Retrieval):
        def evaluate(self, z, x):
            rows.append(len(z))
            return super().evaluate(z, x)

    solve_for_torchdeq("lbfgs", Bound(Watched(3.0), x), query, 300, 1e-8, "rel", [5, 9])
    assert min(rows) < len(query)
    assert second["abs_trace"].shape == (20, 301)


@pytest.mark.parametrize("core", CORES)
def test_a_bound_function_trains_through_get_deq(core):
    known = PROBLEMS["relu retrieval"]
    query, patterns = fresh(known)
    deq = deq_for("auto", core=core, ift=True)
    states, info = deq(Bound(known.f, known.prepare(query, patterns)), known.z0)
    assert info["result"].tolist() == [0, 0, 0]
    found = torch.autograd.grad(loss_of(states[-1]), (query, patterns))
    assert relative_error(found, exact_gradients(known)) < 1e-8


def test_the_trajectory_of_a_solve_that_drops_problems_is_that_of_one_that_does_not():
    patterns = normal(12, 5)
    # The smaller beta, the faster a query contracts: half of these stop early.
    beta = torch.cat([torch.full((10,), 0.05, dtype=F64), torch.full((10,), 0.3, dtype=F64)])
    f = Retrieval(beta)
    query = 0.1 * normal(20, 5, seed=3)
    x = f.prepare(query, patterns)
    arguments = (query, 60, 1e-4, "rel", [1, 6, 9, 60])
    _, dropping, _ = solve_for_torchdeq("picard", Bound(f, x), *arguments)
    _, keeping, info = solve_for_torchdeq("picard", lambda z: f(z, x), *arguments)
    assert info["nstep"].min() < 5
    assert info["nstep"].max() > 9
    for ours, plain in zip(dropping, keeping, strict=True):
        # Matrix products of other sizes round otherwise.
        assert_close(ours, plain, rtol=1e-12, atol=1e-13)
    late = info["nstep"] > 9
    assert not torch.equal(keeping[1][late], keeping[0][late])


def test_a_root_at_zero_is_found_with_a_relative_tolerance():
    z, _, info = solve_for_torchdeq("picard", lambda z: 0.5 * z, torch.ones(1, 2, dtype=F64), 60, 1e-3, "rel")
    assert info["result"].tolist() == [0]
    assert float(z.abs().max()) < 2e-12


@pytest.mark.parametrize("no_stat", [False, True])
@pytest.mark.parametrize("solver", OURS)
def test_lists_of_states_work_with_and_without_their_statistics(solver, no_stat):
    a = normal(3, 2)

    def f(u, v):
        return torch.cos(v).sum(1, keepdim=True) * 0.2 + a[:, :1], 0.3 * u + torch.tanh(0.5 * v) + a

    # get_deq ignores no_stat.
    deq = torchdeq.core.DEQSliced(f_solver=f"hopdeq_{solver}", no_stat=no_stat, **TIGHTLY)
    z0 = [torch.zeros(3, 1, dtype=F64), torch.zeros(3, 2, dtype=F64)]
    states, info = deq.eval()(f, z0)
    u, v = states[-1]
    fu, fv = f(u, v)
    assert info["result"].tolist() == [0, 0, 0]
    assert_close(fu, u, rtol=1e-10, atol=1e-10)
    assert_close(fv, v, rtol=1e-10, atol=1e-10)


def test_options_go_through_solver_kwargs_and_misspelt_ones_are_refused():
    deq = deq_for("lbfgs", ift=True)
    z0 = torch.zeros(2, 3, dtype=F64)
    deq(torch.cos, z0, solver_kwargs={"memory": 2, "guard": False, "f_max_iter": 50})
    with pytest.raises(TypeError, match="memry.*Did you mean 'memory'"):
        deq(torch.cos, z0, solver_kwargs={"memry": 2})
    with pytest.raises(TypeError, match="tau"):
        deq_for("auto")(torch.cos, z0, solver_kwargs={"tau": 0.5})
    seen = []
    register_solver("seen", lambda: seen.append(1) or LBFGS())
    from hopdeq_lwpf.solvers.registry import SOLVERS

    try:
        assert "hopdeq_seen" in register_with_torchdeq()
        deq_for("seen")(torch.cos, z0)
        assert seen
    finally:
        del SOLVERS["seen"], torchdeq.solver._solvers["hopdeq_seen"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_iter": 0}, "max_iter"),
        ({"max_iter": 2.5}, "max_iter"),
        ({"max_iter": "3"}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"tol": float("nan")}, "tol"),
        ({"tol": None}, "tol"),
        ({"stop_mode": "relx"}, "stop_mode.*Did you mean 'rel'"),
    ],
)
def test_wrong_arguments_of_their_interface_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_for_torchdeq("picard", torch.cos, torch.zeros(2, 3), **arguments)


def test_a_second_derivative_through_their_implicit_gradient_is_refused():
    g, w, x = contraction()
    x.requires_grad_()
    states, _ = deq_for("anderson", ift=True)(lambda z: g(z, w, x), torch.zeros_like(x))
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(states[-1].sum(), x, create_graph=True)


def test_a_nan_row_harms_no_other_there_either():
    x = normal(3, 2)
    x[1] = float("nan")
    for solver in OURS:
        f, z0 = (lambda z: torch.tanh(0.5 * z) + x), torch.zeros_like(x)
        z, _, info = solve_for_torchdeq(solver, f, z0, 100, 1e-9, "rel")
        assert info["result"].tolist() == [0, Result.NONFINITE, 0]
        assert_close(torch.tanh(0.5 * z[[0, 2]]) + x[[0, 2]], z[[0, 2]], rtol=1e-8, atol=1e-8)
        assert bool(info["rel_lowest"][[0, 2]].isfinite().all())


@pytest.mark.parametrize("solver", OURS)
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3, 4)])
def test_any_shape_of_state_works_there(solver, shape):
    z, _, info = solve_for_torchdeq(solver, torch.cos, torch.zeros(shape, dtype=F64), 200, 1e-10, "rel")
    assert z.shape == shape
    batch = shape[:1]
    assert info["abs_lowest"].shape == info["nstep"].shape == batch
    assert info["abs_trace"].shape == (*batch, 201)
    assert_close(torch.cos(z), z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_work_there(dtype):
    x0 = torch.zeros(2, 3, dtype=dtype)
    for solver in OURS:
        z, _, info = solve_for_torchdeq(solver, lambda z: 0.5 * z + 1, x0, 60, 1e-2, "rel")
        assert z.dtype == dtype
        assert info["result"].tolist() == [0, 0]
        assert_close(z.double(), torch.full((2, 3), 2.0, dtype=F64), rtol=0.05, atol=0)


def test_modules_with_ours_can_be_copied_and_pickled():
    deq = deq_for("lbfgs", ift=False)
    for twin in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq.f_solver))):
        assert twin is not None
    states, _ = copy.deepcopy(deq).eval()(torch.cos, torch.zeros(1, 1, dtype=F64))
    assert_close(states[-1].item(), 0.7390851332151607, rtol=1e-10, atol=0)
