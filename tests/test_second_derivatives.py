"""Derivatives of any order through an equilibrium: right, or refused."""

import pytest
import torch
from problems import F64, PROBLEMS, TIGHT, Map, flat, fresh, normal, orthogonal, relative_error, solve
from torch import nn
from torch.autograd import grad, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from hopdeq_lwpf import Equilibrium, Termination, fixed_point, retrieve
from hopdeq_lwpf.solvers import Implicit, Neumann, OneStep, Phantom

EXACT = {name: Implicit(name, rtol=1e-12, max_steps=2000) for name in ("auto", "gmres", "picard", "anderson")}
SYMMETRIC = {name: Implicit(name, rtol=1e-12, max_steps=2000) for name in ("cg", "minres")}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("adjoint", EXACT)
def test_gradgradcheck(name, adjoint):
    problem = PROBLEMS[name]
    options = {"adjoint": EXACT[adjoint], "solver": "picard"}
    function = lambda *a: flat(solve(problem, a, **options).value)  # noqa: E731
    assert gradgradcheck(function, fresh(problem), fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if problem.symmetric])
@pytest.mark.parametrize("adjoint", SYMMETRIC)
def test_gradgradcheck_in_the_metric(name, adjoint):
    problem = PROBLEMS[name]
    options = {"adjoint": SYMMETRIC[adjoint], "solver": "picard"}
    function = lambda *a: flat(solve(problem, a, **options).value)  # noqa: E731
    assert gradgradcheck(function, fresh(problem), fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["tanh", "cos", "softmax retrieval", "dict"])
def test_gradgradcheck_through_unrolled_and_counted_steps(name):
    problem = PROBLEMS[name]
    for options in ({"adjoint": "unrolled", "solver": "picard", "stop": Termination(1e-9)}, {"steps": 3}):
        function = lambda *a, o=options: flat(solve(problem, a, **o).value)  # noqa: E731
        assert gradgradcheck(function, fresh(problem), fast_mode=True)


@pytest.mark.parametrize("adjoint", [Implicit(rtol=1e-13), "unrolled"], ids=["implicit", "unrolled"])
def test_four_derivatives_of_a_known_equilibrium(adjoint):
    # z* = 1 / (1 - a): the n-th derivative is n! / (1 - a)^(n + 1).
    a = torch.tensor([[0.3]], dtype=F64, requires_grad=True)
    f = Map(lambda z, a: a * z + 1.0)
    value = fixed_point(
        f, (a,), torch.zeros(1, 1, dtype=F64), stop=TIGHT, adjoint=adjoint, solver="picard"
    ).value
    for factorial, power in ((1, 2), (2, 3), (6, 4), (24, 5)):
        (value,) = grad(value.sum(), a, create_graph=True)
        # Each derivative of an unrolled solve lags behind the one before.
        assert value.item() == pytest.approx(factorial / 0.7**power, rel=1e-7)


def hessian_products(f, x, leaves, adjoint):
    """d/d(leaves) of |d loss / d(leaves)|^2."""
    z0 = torch.zeros(2, 3, dtype=F64)
    value = fixed_point(f, x(*leaves), z0, stop=TIGHT, adjoint=adjoint, solver="picard").value
    first = grad((value**3).sum(), leaves, create_graph=True)
    return grad(sum((g * g).sum() for g in first), leaves)


@pytest.mark.parametrize("closed", [False, True])
def test_x_that_was_computed_from_a_tensor_that_f_uses_too(closed):
    # Both paths to w count, once each.
    w = (0.6 * orthogonal(3)).requires_grad_()
    b = normal(2, 3).requires_grad_()

    def f(z, x):
        inner = w if closed else x[1]
        return torch.tanh(z @ inner.T + x[0])

    def x(w, b):
        return (b @ w).sin(), w

    exact = hessian_products(f, x, (w, b), Implicit(rtol=1e-13))
    assert relative_error(exact, hessian_products(f, x, (w, b), "unrolled")) < 1e-8


def test_second_derivative_to_an_input_that_was_itself_computed():
    w = (0.6 * orthogonal(3)).requires_grad_()
    b = (2 * normal(2, 3).requires_grad_()).sin()

    def penalty(adjoint):
        f = Map(lambda z, w, b: torch.tanh(z @ w.T + b))
        z0 = torch.zeros(2, 3, dtype=F64)
        z = fixed_point(f, (w, b), z0, stop=TIGHT, adjoint=adjoint, solver="picard").value
        (slope,) = grad(z.pow(2).sum(), b, create_graph=True)
        return grad(slope.pow(2).sum(), (w, b), retain_graph=True)

    assert relative_error(penalty(Implicit(rtol=1e-13)), penalty("unrolled")) < 1e-8


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3).double()
        nn.init.orthogonal_(self.inner.weight, 0.7)

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + x)


def test_gradient_penalty_trains_a_layer_as_unrolling_does():
    def step(adjoint):
        torch.manual_seed(0)
        layer = Equilibrium(Cell(), adjoint=adjoint, stop=TIGHT, solver="picard")
        x = normal(4, 3).requires_grad_()
        (slope,) = grad(layer(x).sum(), x, create_graph=True)
        slope.pow(2).sum().backward()
        return tuple(p.grad for p in layer.parameters())

    assert relative_error(step(Implicit(rtol=1e-13)), step("unrolled")) < 1e-8


def test_second_derivatives_when_f_checkpoints_inside():
    def products(inside):
        torch.manual_seed(0)
        cell = Cell()
        f = (lambda z, x: checkpoint(cell, z, x, use_reentrant=False)) if inside else cell
        leaves = (*cell.parameters(), normal(2, 3).requires_grad_())
        return hessian_products(f, lambda *leaves: leaves[-1], leaves, Implicit(rtol=1e-13))

    assert relative_error(products(True), products(False)) < 1e-12


def test_implicit_second_derivative_after_the_graph_was_freed_is_an_error():
    x = torch.tensor([[0.3]], dtype=F64, requires_grad=True)
    f = Map(lambda z, x: 0.5 * torch.tanh(z) + torch.sin(x))
    value = fixed_point(f, (x,), torch.zeros(1, 1, dtype=F64), stop=TIGHT).value
    grad(value.sum(), x)
    with pytest.raises(RuntimeError, match="second time"):
        grad(value.sum(), x, create_graph=True)


def test_patterns_beta_and_injected_query_of_a_retrieval():
    patterns, query = (0.6 * normal(5, 4)).requires_grad_(), normal(3, 4, seed=2).requires_grad_()
    beta = torch.tensor(0.9, dtype=F64, requires_grad=True)

    def recall(q, p, b, adjoint):
        # The solve is symmetric here, so that CG solves for J as well as for its transpose.
        return retrieve(q, p, beta=b, inject="input", adjoint=adjoint, stop=TIGHT, solver="picard").value

    leaves = (query, patterns, beta)
    exact = Implicit(rtol=1e-13)
    assert gradgradcheck(lambda *a: recall(*a, exact), leaves, fast_mode=True, atol=1e-6, rtol=1e-4)


# --- refused


@pytest.mark.parametrize("loss", [torch.sum, lambda z: (z**2).sum()], ids=["linear", "square"])
@pytest.mark.parametrize("adjoint", [OneStep(), Neumann(3), Phantom(2)], ids=repr)
def test_second_derivative_of_an_approximation_is_refused(adjoint, loss):
    x = torch.tensor([[0.3]], dtype=F64, requires_grad=True)
    f = Map(lambda z, x: 0.5 * torch.tanh(z) + torch.sin(x))
    value = fixed_point(f, (x,), torch.zeros(1, 1, dtype=F64), stop=TIGHT, adjoint=adjoint).value
    (gradient,) = grad(loss(value), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"approximates.*unrolled"):
        grad(gradient.sum(), x)


def test_second_derivative_through_a_computed_tensor_in_a_closure_is_refused_and_the_first_is_right():
    w = normal(2, 3).requires_grad_()
    inner = w.sin()

    def solved(f, x):
        return fixed_point(f, x, torch.zeros(2, 3, dtype=F64), stop=TIGHT).value

    closed = solved(lambda z, x: 0.5 * torch.tanh(z) + inner, None)
    given = solved(lambda z, x: 0.5 * torch.tanh(z) + x, inner)
    (first,) = grad(closed.pow(2).sum(), w, create_graph=True)
    assert_close(first, grad(given.pow(2).sum(), w, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="Hand it to f through x"):
        grad(first.sum(), w)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own forward mode
def test_forward_mode_is_refused():
    x = torch.tensor([[0.3]], dtype=F64)
    f = Map(lambda z, x: 0.5 * torch.tanh(z) + torch.sin(x))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp|forward"):
            fixed_point(f, (dual,), torch.zeros(1, 1, dtype=F64), stop=TIGHT)
