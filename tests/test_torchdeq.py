"""torchdeq's solvers in our solves."""

import pytest
import torch
import torchdeq.solver
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    F64,
    PROBLEMS,
    Map,
    exact_gradients,
    flat,
    fresh,
    loss_of,
    normal,
    relative_error,
    solve,
)
from torch.testing import assert_close

from hopdeq_lwpf import ConvergenceError, Equilibrium, Result, Termination, fixed_point, retrieve
from hopdeq_lwpf.solvers import Picard
from hopdeq_lwpf.solvers.torchdeq import THEIRS, TorchDEQ

STOP = Termination(rtol=1e-10, atol=1e-13, max_steps=3000)


def half(z, b):
    return 0.5 * z + b


def contraction(rows: int = 4, width: int = 5, rate: float = 0.6):
    """z = tanh(W z + x) with |W| = rate: the function, W and x."""
    w = rate * torch.linalg.qr(normal(width, width))[0]
    return (lambda z, w, x: torch.tanh(z @ w.T + x)), w, normal(rows, width, seed=2)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", THEIRS)
def test_their_solvers_find_the_root_of_every_problem(name, problem):
    known = PROBLEMS[problem]
    solution = solve(known, solver=f"torchdeq:{name}", stop=STOP)
    assert bool(solution.converged.all())
    # A relative residual of 1e-10 at a rate of .9 is an error of 1e-9; one root is zero, where atol rules.
    assert_close(flat(solution.value), flat(known.root), rtol=2e-9, atol=1e-9)


@pytest.mark.parametrize("problem", ["tanh", "triangular", "relu retrieval", "dict", "batch of two dims"])
@pytest.mark.parametrize("name", THEIRS)
def test_residual_steps_and_evaluations_are_those_of_the_state_returned(name, problem):
    known = PROBLEMS[problem]
    solution = solve(known, solver=f"torchdeq:{name}", stop=Termination(rtol=1e-3, max_steps=50))
    again = fixed_point(
        known.f, known.prepare(*known.arguments), solution.state, steps=1, stop=Termination(rtol=1e-3)
    )
    assert_close(solution.residual, again.residual, rtol=1e-9, atol=1e-12)
    assert bool((solution.evaluations == solution.steps + 1).all())


def test_the_adapter_counts_every_call_of_f():
    calls = []
    f = Map(lambda z, b: calls.append(1) or half(z, b))
    for name in THEIRS:
        calls.clear()
        b = torch.ones(2, 3)
        with torch.no_grad():
            solution = fixed_point(f, (b,), torch.zeros(2, 3), solver=f"torchdeq:{name}")
        assert len(calls) == int(solution.evaluations.max())


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("name", ["fixed_point_iter", "simple_fixed_point_iter"])
def test_their_fixed_point_iteration_is_picard_step_for_step(name, damping):
    known = PROBLEMS["triangular"]
    for stop in (STOP, Termination(rtol=1e-3), Termination(max_steps=5)):
        ours = solve(known, solver=Picard(damping), stop=stop, trace=True)
        theirs = solve(known, solver=TorchDEQ(name, tau=1 - damping), stop=stop, trace=True)
        assert_close(theirs.value, ours.value, rtol=1e-12, atol=1e-14)
        assert torch.equal(theirs.steps, ours.steps)
        assert torch.equal(theirs.result, ours.result)
        assert_close(theirs.trace.residual, ours.trace.residual, equal_nan=True, rtol=1e-2, atol=1e-13)


@pytest.mark.parametrize("name", THEIRS)
def test_their_results_have_our_codes(name):
    solver = f"torchdeq:{name}"
    b = torch.ones(3, 2, dtype=F64)
    f = Map(lambda z, b: torch.tanh(0.9 * z) + b)
    few = fixed_point(f, (b,), torch.zeros_like(b), solver=solver, stop=Termination(rtol=1e-12, max_steps=2))
    assert few.result.tolist() == [Result.MAX_STEPS] * 3
    assert few.steps.tolist() == [2] * 3
    with pytest.raises(ConvergenceError, match="3 of 3"):
        few.require()
    # All of them start with a plain step, which multiplies the residual by 1e4.
    jump = fixed_point(Map(lambda z, b: 1e4 * z + b), (b,), b, solver=solver, stop=Termination(divergence=10))
    assert jump.result.tolist() == [Result.DIVERGED] * 3
    broken = fixed_point(Map(lambda z, b: b / (z - z)), (b,), b, solver=solver)
    assert broken.result.tolist() == [Result.NONFINITE] * 3


@pytest.mark.parametrize("name", THEIRS)
def test_a_problem_of_nan_harms_no_other(name):
    g, w, x = contraction()
    f = Map(lambda z, w, x: g(z, w, x))
    spoilt = x.clone()
    spoilt[1, 2] = float("nan")
    clean = fixed_point(f, (w, x), torch.zeros_like(x), solver=f"torchdeq:{name}", stop=STOP)
    found = fixed_point(f, (w, spoilt), torch.zeros_like(x), solver=f"torchdeq:{name}", stop=STOP)
    assert found.result.tolist() == [0, Result.NONFINITE, 0, 0]
    rest = [0, 2, 3]
    assert_close(found.value[rest], clean.value[rest], rtol=1e-9, atol=1e-12)
    assert torch.equal(found.steps[rest], clean.steps[rest])
    assert bool(found.value.isfinite().all())


@pytest.mark.parametrize("name", THEIRS)
def test_a_problem_that_becomes_nan_on_the_way_harms_no_other(name):
    limit = torch.tensor([[1e9], [1.5], [1e9]], dtype=F64)

    def f(z, x):
        return torch.where(z > x, float("nan"), 0.5 * z + 1)

    solution = fixed_point(f, limit, torch.zeros(3, 1, dtype=F64), solver=f"torchdeq:{name}")
    assert solution.result.tolist() == [0, Result.NONFINITE, 0]
    assert_close(solution.value[[0, 2]], torch.full((2, 1), 2.0, dtype=F64), rtol=1e-4, atol=0)
    assert float(solution.value[1]) <= 1.5


@pytest.mark.parametrize("name", THEIRS)
def test_a_batch_is_solved_as_its_problems_are(name):
    g, w, x = contraction()
    f = Map(lambda z, w, x: g(z, w, x))
    together = fixed_point(f, (w, x), torch.zeros_like(x), solver=f"torchdeq:{name}", stop=STOP)
    for i in range(len(x)):
        alone = fixed_point(
            f, (w, x[i : i + 1]), torch.zeros(1, 5, dtype=F64), solver=f"torchdeq:{name}", stop=STOP
        )
        assert_close(alone.value[0], together.value[i], rtol=1e-9, atol=1e-12)
        assert int(alone.steps[0]) == int(together.steps[i])


def test_singular_systems_of_their_anderson_do_not_stop_a_solve():
    g, w, x = contraction(rows=6, rate=0.95)
    w, x = w.float(), x.float()
    f = Map(lambda z, w, x: g(z, w, x))
    anderson = TorchDEQ("anderson", lam=0.0)
    z0, stop = torch.zeros_like(x), Termination(rtol=1e-6, max_steps=2000)
    with pytest.raises(torch.linalg.LinAlgError):
        torchdeq.solver.get_solver("anderson")(lambda z: g(z, w, x), z0, max_iter=200, tol=0.0, lam=0.0)
    solution = fixed_point(f, (w, x), z0, solver=anderson, stop=stop).require()
    expected = fixed_point(f, (w, x), z0, solver="picard", stop=stop).require()
    assert_close(solution.value, expected.value, rtol=1e-3, atol=1e-4)


def test_an_error_of_f_itself_is_never_swallowed():
    def f(z, x):
        torch.linalg.inv(torch.zeros(2, 2))

    with pytest.raises(torch.linalg.LinAlgError):
        fixed_point(f, None, torch.zeros(2, 2), solver="torchdeq:anderson")


@pytest.mark.parametrize("problem", ["tanh", "metric", "softmax retrieval", "dict", "tuple"])
@pytest.mark.parametrize("name", THEIRS)
def test_implicit_gradients_of_their_states_are_exact(name, problem):
    known = PROBLEMS[problem]
    arguments = fresh(known)
    stop = Termination(rtol=1e-12, atol=1e-14, max_steps=3000)
    solution = solve(known, arguments, solver=f"torchdeq:{name}", stop=stop)
    found = torch.autograd.grad(loss_of(solution.value), arguments)
    # The adjoint tolerance is 1e-6 of the gradient; the state is better.
    assert relative_error(found, exact_gradients(known)) < 1e-5


@pytest.mark.parametrize(
    "solver",
    [TorchDEQ("broyden", LBFGS_thres=40), TorchDEQ("anderson", m=2, lam=1e-8), TorchDEQ("anderson", tau=0.7)],
)
def test_their_solvers_find_roots_with_their_options(solver):
    for problem in ("tanh", "softmax retrieval", "tuple"):
        known = PROBLEMS[problem]
        assert_close(
            flat(solve(known, solver=solver, stop=STOP).require().value),
            flat(known.root),
            rtol=2e-9,
            atol=1e-9,
        )


def test_unrolling_their_solvers_is_refused_with_what_to_do():
    known = PROBLEMS["tanh"]
    with pytest.raises(ValueError, match="adjoint='implicit'"):
        solve(known, fresh(known), solver="torchdeq:anderson", adjoint="unrolled")
    with torch.no_grad():
        solution = solve(known, solver="torchdeq:broyden", adjoint="unrolled")
    assert_close(solution.value, known.root)


@pytest.mark.parametrize("name", THEIRS)
def test_the_trace_holds_every_evaluation_and_nan_after_a_problem_has_stopped(name):
    start = torch.tensor([[0.0], [1.999999]], dtype=F64)
    solution = fixed_point(
        Map(lambda z, b: torch.cos(z) + b),
        (torch.zeros(2, 1, dtype=F64),),
        start,
        solver=f"torchdeq:{name}",
        trace=True,
    )
    trace = solution.trace.residual
    for i, steps in enumerate(solution.steps.tolist()):
        assert_close(trace[steps, i], solution.residual[i])
        assert bool(trace[: steps + 1, i].isfinite().all())
        assert bool(trace[steps + 1 :, i].isnan().all())
    assert_close(trace[0], (torch.cos(start) - start).abs()[:, 0] / torch.cos(start).abs()[:, 0])


def test_the_trace_has_the_energy_where_f_has_one():
    patterns, query = normal(6, 4), normal(3, 4, seed=2)
    recalled = retrieve(query, patterns, beta=2.0, solver="torchdeq:fixed_point_iter", trace=True)
    expected = retrieve(query, patterns, beta=2.0, solver="picard", trace=True)
    assert_close(recalled.trace.energy, expected.trace.energy, equal_nan=True)


def test_retrieve_and_equilibrium_take_them_by_name_and_by_object():
    patterns = normal(6, 4)
    query = patterns[:3] + 0.1 * normal(3, 4, seed=2)
    expected = retrieve(query, patterns, beta=8.0).require()
    for solver in (
        "torchdeq:broyden",
        TorchDEQ("anderson", lam=1e-10),
        TorchDEQ("fixed_point_iter", tau=0.9),
    ):
        recalled = retrieve(query, patterns, beta=8.0, solver=solver).require()
        assert torch.equal(recalled.index, expected.index)
        assert_close(recalled.value, expected.value, rtol=1e-4, atol=1e-4)
    cell = Equilibrium(lambda z, x: 0.5 * torch.tanh(z) + x, solver="torchdeq:broyden", on_failure="raise")
    assert cell(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", THEIRS)
def test_every_dtype_is_solved_in_float32_or_wider(name, dtype):
    b = torch.ones(2, 3, dtype=dtype)
    stop = Termination(rtol=4 * torch.finfo(dtype).eps, atol=0.0)
    solution = fixed_point(
        Map(half), (b,), torch.zeros_like(b), solver=f"torchdeq:{name}", stop=stop
    ).require()
    assert solution.value.dtype == dtype
    # At a rate of .5 the error is twice the residual.
    assert_close(solution.value, 2 * b, rtol=10 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", THEIRS)
def test_an_empty_batch_has_an_empty_solution(name):
    solution = fixed_point(
        Map(half), (torch.ones(0, 3),), torch.zeros(0, 3), solver=f"torchdeq:{name}", trace=True
    )
    assert solution.value.shape == (0, 3)
    assert solution.result.shape == (0,)


def test_f_runs_under_autocast_and_their_algebra_does_not():
    w = 0.3 * torch.eye(4)
    seen = []

    def f(z, x):
        product = z @ w
        seen.append(product.dtype)
        return product.float() + x

    x, stop = torch.ones(2, 4), Termination(rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        solution = fixed_point(f, x, torch.zeros(2, 4), solver="torchdeq:broyden", stop=stop)
    assert set(seen) == {torch.bfloat16}
    assert solution.value.dtype == torch.float32
    assert bool(solution.converged.all())


def test_the_start_and_the_context_are_left_as_they_were():
    b, z0 = torch.ones(2, 3), torch.full((2, 3), 0.3)
    for name in THEIRS:
        fixed_point(Map(half), (b,), z0, solver=f"torchdeq:{name}")
    assert torch.equal(z0, torch.full((2, 3), 0.3))
    assert torch.equal(b, torch.ones(2, 3))


@given(
    st.integers(1, 5), st.integers(1, 6), st.floats(0.05, 0.8), st.sampled_from(THEIRS), st.integers(0, 10**6)
)
def test_what_converged_meets_the_tolerance_whatever_the_map(rows, width, rate, name, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(width, width, dtype=F64, generator=generator)
    w = rate * w / torch.linalg.matrix_norm(w, 2)
    b = torch.randn(rows, width, dtype=F64, generator=generator)
    solution = fixed_point(
        Map(lambda z, w, b: torch.tanh(z @ w.T) + b), (w, b), 0 * b, solver=f"torchdeq:{name}"
    )
    fz = torch.tanh(solution.value @ w.T) + b
    distance = (fz - solution.value).norm(dim=1)
    assert bool(solution.converged.all())
    assert bool((distance <= 1e-5 * fz.norm(dim=1) + 1e-8).all())
    assert bool((solution.evaluations == solution.steps + 1).all())
