"""Gradients of equilibria, against a dense solve, finite differences and autograd through the iteration."""

import pytest
import torch
from problems import (
    F64,
    PROBLEMS,
    SOLVERS,
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
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from hopdeq_lwpf import Result, Termination, fixed_point
from hopdeq_lwpf._types import ConvergenceWarning
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import Implicit, Neumann, OneStep, Phantom, Unrolled

every_problem = pytest.mark.parametrize("name", PROBLEMS)
SYMMETRIC = [Implicit(name, rtol=1e-12) for name in ("cg", "minres")]
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


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if problem.symmetric])
@pytest.mark.parametrize("adjoint", SYMMETRIC, ids=lambda adjoint: adjoint.solver)
def test_symmetric_adjoint_solvers_in_the_metric(name, adjoint):
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


@pytest.mark.parametrize(("solver", "method"), [("auto", "cg+minres"), ("minres", "minres")])
def test_equilibrium_that_is_a_saddle(solver, method):
    f = Retrieval(8.0)
    patterns = torch.cat([torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)]).requires_grad_()
    z0 = torch.zeros(2, 4, dtype=F64)  # J = 2 I: an equilibrium, and unstable
    solution = fixed_point(f, f.prepare(z0, patterns), z0, adjoint=Implicit(solver))
    g = normal(2, 4)
    (actual,) = torch.autograd.grad(solution.value, patterns, g)
    (exact,) = torch.autograd.grad(f(z0, f.prepare(z0, patterns)), patterns, g / (1 - 2.0))
    assert_close(actual, exact)
    assert solution.adjoint.method == method
    assert (solution.adjoint.result == Result.CONVERGED).all()


@pytest.mark.parametrize("adjoint", [Implicit(name) for name in ("cg", "minres", "gmres")], ids=repr)
@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e25])
def test_squares_of_the_incoming_gradient_neither_vanish_nor_overflow(adjoint, scale):
    problem = PROBLEMS["softmax retrieval"]
    arguments = tuple(a.float().requires_grad_() for a in problem.arguments)
    x = problem.prepare(*arguments)
    value = fixed_point(problem.f, x, problem.z0.float(), adjoint=adjoint, stop=Termination(1e-6)).value
    expected = torch.autograd.grad(loss_of(value), arguments, retain_graph=True)
    actual = torch.autograd.grad(scale * loss_of(value), arguments)
    assert relative_error(tuple(a.double() / scale for a in actual), expected) < 1e-5


def test_an_unrolled_solve_that_starts_at_the_root_still_depends_on_its_arguments():
    b = normal(2, 3).requires_grad_()
    f = Map(lambda z, b: 0.5 * z + b)
    solution = fixed_point(f, (b,), 2 * b.detach(), adjoint="unrolled", solver="picard")
    (g,) = torch.autograd.grad(solution.value.sum(), b)
    # One step of the series 1 + 1/2 + 1/4 + ...
    assert_close(g, torch.ones_like(b))
    assert (solution.steps == 1).all()


# --- approximations


@every_problem
def test_neumann_series_is_cut_off_after_its_terms(name):
    problem = PROBLEMS[name]
    g = flat(torch.autograd.grad(*loss_at_root(problem)))
    j = jacobian(problem)
    u = sum(torch.linalg.matrix_power(j.T, i) @ g for i in range(4))
    arguments = fresh(problem)
    image = flat(problem.f(problem.root, problem.prepare(*arguments)))
    expected = torch.autograd.grad(image, arguments, u)
    assert relative_error(gradients(problem, adjoint=Neumann(4)), expected) < 1e-10


@every_problem
def test_neumann_runs_from_one_step_to_implicit(name):
    problem = PROBLEMS[name]
    one = gradients(problem, adjoint=Neumann(1))
    assert relative_error(one, gradients(problem, adjoint=OneStep())) < 1e-14
    assert relative_error(gradients(problem, adjoint=Neumann(300)), exact_gradients(problem)) < 1e-9


def test_neumann_reports_what_is_left_and_does_not_warn():
    problem = PROBLEMS["affine"]
    arguments = fresh(problem)
    solution = solve(problem, arguments, adjoint=Neumann(6))
    torch.autograd.grad(loss_of(solution.value), arguments)
    assert solution.adjoint.method == "neumann(6)"
    assert_close(solution.adjoint.residual, torch.full((3,), 0.5**6, dtype=F64))
    assert (solution.adjoint.result == Result.MAX_STEPS).all()
    assert solution.adjoint.steps.tolist() == [6] * 3


@every_problem
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_phantom_is_autograd_through_damped_steps_from_the_equilibrium(name, damping):
    problem = PROBLEMS[name]
    arguments = fresh(problem)
    x = problem.prepare(*arguments)
    z = problem.root
    for _ in range(3):
        blend = lambda new, old: (1 - damping) * new + damping * old  # noqa: E731
        z = pytree.tree_map(blend, problem.f(z, x), z)
    # The value is the equilibrium, so the loss is differentiated there.
    root = pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), problem.root)
    g = flat(torch.autograd.grad(loss_of(root), pytree.tree_leaves(root)))
    expected = torch.autograd.grad(flat(z), arguments, g)
    actual = gradients(problem, adjoint=Phantom(3, damping))
    assert relative_error(actual, expected) < 1e-9


def test_phantom_of_one_plain_step_is_one_step_and_of_many_implicit():
    problem = PROBLEMS["tanh"]
    one = gradients(problem, adjoint=Phantom(1, 0.0))
    assert relative_error(one, gradients(problem, adjoint=OneStep())) < 1e-14
    assert relative_error(gradients(problem, adjoint=Phantom(200, 0.2)), exact_gradients(problem)) < 1e-9


def test_value_of_phantom_is_the_equilibrium_that_the_residual_is_reported_of():
    problem = PROBLEMS["triangular"]
    rough = Termination(rtol=1e-2)
    phantom = solve(problem, fresh(problem), adjoint=Phantom(5), stop=rough, solver="picard")
    plain = solve(problem, adjoint="onestep", stop=rough, solver="picard")
    assert torch.equal(phantom.value, plain.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Neumann(0), "terms must be an integer >= 1, got 0"),
        (lambda: Phantom(0), "k must be an integer >= 1, got 0"),
        (lambda: Phantom(2, 1.0), "damping must be below 1"),
        (lambda: Implicit("minress"), "Did you mean 'minres'"),
    ],
)
def test_wrong_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_symmetric_solvers_need_a_metric():
    problem = PROBLEMS["triangular"]
    for name in ("cg", "minres"):
        with pytest.raises(ValueError, match=f"'{name}' needs a metric"):
            gradients(problem, adjoint=Implicit(name))


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
