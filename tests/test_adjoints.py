"""Gradients of equilibria, against a dense solve, finite differences and autograd through the iteration."""

import pytest
import torch
from problems import (
    F64,
    PROBLEMS,
    SOLVERS,
    TIGHT,
    Map,
    exact_gradients,
    flat,
    fresh,
    jacobian,
    loss_of,
    normal,
    relative_error,
    solve,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from hopdeq_lwpf import Result, Termination, fixed_point
from hopdeq_lwpf._types import ConvergenceWarning
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import Implicit, OneStep, Unrolled

every_problem = pytest.mark.parametrize("name", PROBLEMS)
EXACT = [Implicit(name, rtol=1e-12, max_steps=2000) for name in ("auto", "gmres", "picard", "anderson")]


def gradients(problem, scale=1.0, **options):
    arguments = fresh(problem)
    value = solve(problem, arguments, **options).value
    return torch.autograd.grad(scale * loss_of(value), arguments)


@every_problem
@pytest.mark.parametrize("adjoint", EXACT, ids=lambda adjoint: adjoint.solver)
def test_implicit_equals_the_dense_solve(name, adjoint):
    problem = PROBLEMS[name]
    assert relative_error(gradients(problem, adjoint=adjoint), exact_gradients(problem)) < 1e-10


@every_problem
def test_implicit_equals_unrolled(name):
    problem = PROBLEMS[name]
    implicit = gradients(problem, adjoint=EXACT[0])
    unrolled = gradients(problem, adjoint="unrolled", solver="picard")
    assert problem.rate <= 0.9
    assert relative_error(implicit, unrolled) < 1e-8


@every_problem
@pytest.mark.parametrize("solver", SOLVERS)
def test_default_adjoint_after_every_solver(name, solver):
    problem = PROBLEMS[name]
    assert relative_error(gradients(problem, solver=solver), exact_gradients(problem)) < 1e-5


@every_problem
@pytest.mark.parametrize("solver", SOLVERS)
def test_unrolled_through_every_solver(name, solver):
    # Solvers that converge faster than linearly leave the derivative a step behind the value.
    problem = PROBLEMS[name]
    actual = gradients(problem, solver=solver, adjoint=Unrolled())
    assert relative_error(actual, exact_gradients(problem)) < 1e-5


@every_problem
@pytest.mark.parametrize("options", [{"adjoint": EXACT[0]}, {"adjoint": "unrolled", "solver": "picard"}])
def test_gradcheck(name, options):
    problem = PROBLEMS[name]
    arguments = fresh(problem)
    # A fast check compares along one random direction: test_implicit_equals_the_dense_solve has every entry.
    fast = sum(a.numel() for a in arguments) > 30
    function = lambda *a: flat(solve(problem, a, **options).value)  # noqa: E731
    assert gradcheck(function, arguments, fast_mode=fast, atol=1e-6, rtol=1e-4)


@every_problem
def test_one_step_differs_by_no_more_than_its_bound(name):
    # It takes g for u = (I - J^T)^-1 g, so it is off by B^T (u - g) = B^T J^T u with B = df/d(arguments).
    problem = PROBLEMS[name]
    exact, rough = exact_gradients(problem), gradients(problem, adjoint=OneStep())
    g = flat(torch.autograd.grad(*loss_at_root(problem)))
    j = jacobian(problem)
    u = torch.linalg.solve(torch.eye(len(g), dtype=F64) - j.T, g)
    arguments = fresh(problem)
    image = flat(problem.f(problem.root, problem.prepare(*arguments)))
    missing = torch.autograd.grad(image, arguments, j.T @ u)
    difference = [e - r for e, r in zip(exact, rough, strict=True)]
    assert relative_error(tuple(difference), missing) < 1e-8
    assert float(flat(difference).norm()) > 0.1 * float(flat(list(exact)).norm())


def loss_at_root(problem):
    z = pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), problem.root)
    return loss_of(z), pytree.tree_leaves(z)


@every_problem
@pytest.mark.parametrize("adjoint", [Implicit(), *EXACT[1:]], ids=lambda adjoint: adjoint.solver)
def test_scaled_loss_gives_the_scaled_gradient(name, adjoint):
    problem = PROBLEMS[name]
    whole = gradients(problem, adjoint=adjoint)
    small = gradients(problem, 1e-6, adjoint=adjoint)
    assert relative_error(tuple(1e6 * g for g in small), whole) < 1e-5
    assert relative_error(small, exact_gradients(problem, 1e-6)) < 1e-5


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("adjoint", EXACT, ids=lambda adjoint: adjoint.solver)
def test_extreme_losses(scale, adjoint):
    problem = PROBLEMS["softmax retrieval"]
    actual, exact = gradients(problem, scale, adjoint=adjoint), exact_gradients(problem)
    assert_close(list(actual), [scale * e for e in exact], rtol=1e-8, atol=0)


def test_one_problem_with_an_upstream_gradient_of_zero():
    problem = PROBLEMS["pfu retrieval"]
    query, patterns = fresh(problem)
    solution = solve(problem, (query, patterns))
    (gradient,) = torch.autograd.grad(loss_of(solution.value[1:]), query)
    assert (gradient[0] == 0).all()
    assert (gradient[1:] != 0).any()
    assert (solution.adjoint.result == Result.CONVERGED).all()
    assert solution.adjoint.steps[0] == 0 < solution.adjoint.steps[1]


def test_report_of_the_adjoint_solve():
    problem = PROBLEMS["softmax retrieval"]
    arguments = fresh(problem)
    solution = solve(problem, arguments, adjoint=Implicit(rtol=1e-7))
    assert solution.adjoint.result is None
    torch.autograd.grad(loss_of(solution.value), arguments)
    report = solution.adjoint
    assert report.method == "cg"
    assert report.result.shape == report.residual.shape == report.steps.shape == (3,)
    assert (report.residual <= 1e-7).all()
    assert (report.steps > 1).all()


@pytest.mark.parametrize("name", ["auto", "cg", "gmres", "picard", "anderson"])
def test_adjoint_that_does_not_converge_warns_and_says_so(name):
    problem = PROBLEMS["softmax retrieval"]
    arguments = fresh(problem)
    solution = solve(problem, arguments, adjoint=Implicit(name, max_steps=1))
    with pytest.warns(ConvergenceWarning, match=r"3 of 3 problems unconverged; worst residual .*max_steps"):
        torch.autograd.grad(loss_of(solution.value), arguments)
    assert (solution.adjoint.result == Result.MAX_STEPS).all()
    assert (solution.adjoint.residual > 1e-6).all()


def test_cg_at_a_saddle_is_finished_by_gmres():
    f = Retrieval(8.0)
    patterns = torch.cat([torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)]).requires_grad_()
    z0 = torch.zeros(2, 4, dtype=F64)  # J = 2 I: an equilibrium, and unstable
    solution = fixed_point(f, f.prepare(z0, patterns), z0)
    g = normal(2, 4)
    (actual,) = torch.autograd.grad(solution.value, patterns, g)
    (exact,) = torch.autograd.grad(f(z0, f.prepare(z0, patterns)), patterns, g / (1 - 2.0))
    assert_close(actual, exact)
    assert solution.adjoint.method == "cg+gmres"
    assert (solution.adjoint.result == Result.CONVERGED).all()


# --- second derivatives


@pytest.mark.parametrize("loss", [torch.sum, lambda z: (z**2).sum()], ids=["linear", "square"])
@pytest.mark.parametrize("adjoint", [Implicit(), OneStep()], ids=repr)
def test_second_derivative_of_an_implicit_gradient_is_refused(adjoint, loss):
    x = torch.tensor([[0.3]], dtype=F64, requires_grad=True)
    f = Map(lambda z, x: 0.5 * torch.tanh(z) + torch.sin(x))
    value = fixed_point(f, (x,), torch.zeros(1, 1, dtype=F64), stop=TIGHT, adjoint=adjoint).value
    (gradient,) = torch.autograd.grad(loss(value), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice.*unrolled"):
        torch.autograd.grad(gradient.sum(), x)


def test_hessian_through_the_unrolled_solve():
    # z* = 1 / (1 - a) + b: all derivatives are known.
    a = torch.tensor([[0.3]], dtype=F64, requires_grad=True)
    f = Map(lambda z, a: a * z + 1.0)
    value = fixed_point(
        f, (a,), torch.zeros(1, 1, dtype=F64), stop=TIGHT, adjoint="unrolled", solver="picard"
    ).value
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    assert first.item() == pytest.approx(1 / 0.7**2, rel=1e-9)
    assert second.item() == pytest.approx(2 / 0.7**3, rel=1e-9)


@pytest.mark.parametrize("name", ["tanh", "cos", "softmax retrieval", "dict"])
def test_gradgradcheck_through_unrolled_and_counted_steps(name):
    problem = PROBLEMS[name]
    for options in ({"adjoint": "unrolled", "solver": "picard", "stop": Termination(1e-9)}, {"steps": 3}):
        function = lambda *a, o=options: flat(solve(problem, a, **o).value)  # noqa: E731
        assert gradgradcheck(function, fresh(problem), fast_mode=True)


# --- what is saved for the backward pass


def saved_bytes(max_steps: int, **options) -> int:
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    f = Retrieval(4.0, forgetting=PFU(), inject="input")
    query = normal(20, 8).requires_grad_()
    patterns = normal(40, 8, seed=3).requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        x = f.prepare(query, patterns)
        stop = Termination(rtol=0.0, atol=0.0, max_steps=max_steps)
        fixed_point(f, x, f.init(x).detach(), stop=stop, **options)
    return total


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("adjoint", [Implicit(), OneStep()], ids=repr)
def test_saved_memory_does_not_depend_on_the_number_of_steps(adjoint, solver):
    one = saved_bytes(1, adjoint=adjoint, solver=solver)
    assert 0 < one == saved_bytes(60, adjoint=adjoint, solver=solver)
    assert saved_bytes(60, adjoint=Unrolled(), solver=solver) > 10 * one


def test_nothing_is_saved_without_gradients():
    with torch.no_grad():
        assert saved_bytes(20) == 0
