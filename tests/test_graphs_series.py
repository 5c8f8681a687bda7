"""Chebyshev series of sparse operators: their errors, and what they keep in memory."""

import math

import pytest
import torch
from test_diffusion_operators import NAMES, laplacians
from test_graphs_neighbors import Largest

from hopdeq_lwpf.graphs import KNN, diffusion_operator, implicit_euler
from hopdeq_lwpf.graphs.chebyshev import heat_coefficients, heat_terms, resolvent_terms


@pytest.mark.parametrize("tau", [0.01, 0.5, 3.0, 40.0, 3000.0])
@pytest.mark.parametrize("eps", [1e-7, 2e-16])
def test_the_series_of_the_heat_kernel_is_as_exact_as_it_claims(tau, eps):
    terms = heat_terms(tau, eps)
    coefficients = heat_coefficients(torch.tensor([tau], dtype=torch.float64), terms)[:, 0]
    angle = torch.linspace(0, math.pi, 500, dtype=torch.float64)
    made = 1 + sum(c * (k * angle).cos() for k, c in enumerate(coefficients))
    exact = torch.exp(-2 * tau * (angle / 2).cos().square())
    # The cosines of the sum themselves are rounded, the more the higher they are.
    assert (made - exact).abs().max() <= eps + 4e-15 + 1e-16 * terms
    # Not many more terms than needed: half of them are too few.
    few = 1 + sum(c * (k * angle).cos() for k, c in enumerate(coefficients[: terms // 2]))
    assert terms == 2 or (few - exact).abs().max() > eps


@pytest.mark.parametrize("bound", [0.0, 1e-3, 2.0, 600.0])
@pytest.mark.parametrize("eps", [1e-7, 2e-16])
def test_the_series_of_the_resolvent_is_as_exact_as_it_claims(bound, eps):
    root = math.sqrt(1 + bound)
    terms = resolvent_terms(root, eps)
    rho = (root - 1) / (root + 1)
    angle = torch.linspace(0, math.pi, 500, dtype=torch.float64)

    def series(count):
        return (1 + 2 * sum((-rho) ** k * (k * angle).cos() for k in range(1, count + 1))) / root

    exact = 1 / (1 + bound * (angle / 2).cos().square())
    assert (series(terms) - exact).abs().max() <= eps + 4e-15 + 1e-16 * terms
    assert terms == 0 or (series(terms // 2) - exact).abs().max() > eps


@NAMES
def test_sparse_operators_of_many_nodes_make_nothing_that_is_not_linear_in_edges(name):
    graph = KNN(5, sparse=True)(torch.randn(4000, 4))
    weight = graph.weight.requires_grad_()
    x = torch.randn(4000, 4, requires_grad=True)
    eta = torch.tensor(0.5, requires_grad=True)
    with Largest() as seen:
        operator = diffusion_operator(name, graph._replace(weight=weight).laplacian(), eta)
        operator.expand((2,))(x.expand(2, 4000, 4)).square().sum().backward()
    assert weight.grad.any()
    # Two graphs, their diagonals, two ends of each edge, four columns of each gathered edge.
    assert seen.entries <= 2 * 4 * (len(weight) + 4000) < 4000**2 / 10


def test_the_gradient_of_the_sparse_resolvent_keeps_one_result_whatever_the_number_of_products():
    laplacian = laplacians(sparse=True)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def kept(eta):
        saved = []
        operator = implicit_euler(laplacian, torch.tensor(eta, dtype=torch.float64, requires_grad=True))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            operator(x)
        return sum(saved), operator.matrix.terms

    assert kept(0.1)[0] == kept(100.0)[0]
    assert kept(0.1)[1] < kept(100.0)[1] / 5
