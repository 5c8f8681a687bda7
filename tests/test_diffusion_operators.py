"""Diffusion operators against Taylor series and solves, dense against sparse, gradients, stability, memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graphs import from_upper, random_weights, weights
from torch.autograd import gradcheck, gradgradcheck

from hopdeq_lwpf.graphs import (
    KNN,
    LAPLACIANS,
    OPERATORS,
    Graph,
    diffusion_operator,
    explicit_euler,
    heat_kernel,
    implicit_euler,
)

BOTH = pytest.mark.parametrize("sparse", [False, True])
KINDS = pytest.mark.parametrize("kind", LAPLACIANS)
NAMES = pytest.mark.parametrize("name", OPERATORS)


def slow(name, matrix, eta, steps=1):
    """g(L) of one graph: a Taylor series with halvings, a solve, repeated steps; in float64."""
    matrix = matrix.double()
    identity = torch.eye(len(matrix), dtype=torch.float64)
    if name == "implicit":
        return torch.linalg.solve(identity + eta * matrix, identity)
    if name == "explicit":
        result = identity
        for _ in range(steps):
            result = result - eta / steps * (matrix @ result)
        return result
    halvings = max(
        0, math.ceil(math.log2(max(1.0, 4 * eta * float(matrix.abs().sum(-1).max() if len(matrix) else 0))))
    )
    small, term, result = -eta / 2**halvings * matrix, identity, identity
    for k in range(1, 25):
        term = term @ small / k
        result = result + term
    for _ in range(halvings):
        result = result @ result
    return result


def laplacians(*batch, kind="normalized", sparse=False, nodes=6, dtype=torch.float64):
    graph = Graph(random_weights(*batch, nodes=nodes, dtype=dtype), None, nodes, batch)
    return (graph.to_sparse() if sparse else graph).laplacian(kind)


@NAMES
@KINDS
@settings(max_examples=40)
@given(weights(), st.sampled_from([0.0, 1e-4, 0.3, 2.0, 10.0]))
def test_operators_follow_their_definition(name, kind, weight, eta):
    dense = Graph(weight, None, len(weight), ())
    for graph in (dense, dense.to_sparse()):
        laplacian = graph.laplacian(kind)
        # Weights of 50 on six edges: eta bound / 2 reaches 3,000.
        steps = 1 if name != "explicit" else max(1, math.ceil(eta * float(laplacian.bound) / 2))
        operator = diffusion_operator(name, laplacian, eta, steps)
        expected = slow(name, laplacian.to_dense(), eta, steps)
        # Rounding grows with the steps, and with eta L, whose last digit decides that of the result.
        scale = 1 + steps + eta * float(laplacian.bound)
        assert (operator.to_dense() - expected).abs().max() <= 1e-14 * scale
        x = torch.randn(len(weight), 2, dtype=torch.float64)
        torch.testing.assert_close(operator(x), operator.to_dense() @ x, rtol=1e-10, atol=1e-10)


@NAMES
@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("eta", [0.01, 0.03, 1.0, 30.0])
def test_errors_are_at_the_rounding_of_the_dtype(name, sparse, dtype, tolerance, eta):
    graph = KNN(4, sparse=sparse)(torch.randn(60, 3, dtype=dtype))
    laplacian = graph.laplacian()
    steps = 40 if name == "explicit" else 1
    operator = diffusion_operator(name, laplacian, eta, steps)
    expected = slow(name, laplacian.to_dense(), eta, steps)
    error = torch.linalg.matrix_norm(operator.to_dense().double() - expected, ord=2)
    # Forty products of matrices whose entries are rounded err by up to forty roundings.
    assert error <= tolerance * max(1, steps / 8) * torch.linalg.matrix_norm(expected, ord=2)


@KINDS
@BOTH
def test_steps_of_explicit_euler_tend_to_the_heat_kernel(kind, sparse):
    laplacian = laplacians(kind=kind, sparse=sparse)
    heat = heat_kernel(laplacian, 0.7).to_dense()
    errors = [float((explicit_euler(laplacian, 0.7, k).to_dense() - heat).abs().max()) for k in (20, 40, 80)]
    # First order: half the error for twice the steps.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


@NAMES
@BOTH
def test_a_time_of_zero_is_the_identity_exactly_also_beside_others(name, sparse):
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    laplacian = laplacians(2, sparse=sparse)
    assert torch.equal(diffusion_operator(name, laplacian, 0.0)(x), x)
    mixed = diffusion_operator(name, laplacian, torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert torch.equal(mixed(x)[0], x[0])
    assert not torch.equal(mixed(x)[1], x[1])


@NAMES
@BOTH
def test_the_derivative_at_time_zero_is_minus_the_laplacian(name, sparse):
    x = torch.randn(6, 3, dtype=torch.float64)
    laplacian = laplacians(sparse=sparse)
    eta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    y = diffusion_operator(name, laplacian, eta)(x)
    (grad,) = torch.autograd.grad(y.square().sum(), eta, create_graph=True)
    torch.testing.assert_close(grad, -2 * laplacian.quadratic(x))
    if name == "heat":  # d^2/deta^2 |exp(-eta L) x|^2 = 4 |L x|^2
        (second,) = torch.autograd.grad(grad, eta)
        torch.testing.assert_close(second, 4 * laplacian.times(x).square().sum())


@NAMES
@KINDS
@BOTH
def test_isolated_nodes_stay_and_mass_is_kept(name, kind, sparse):
    laplacian = laplacians(kind=kind, sparse=sparse)
    x = torch.randn(6, 3, dtype=torch.float64)
    y = diffusion_operator(name, laplacian, 0.2)(x)
    torch.testing.assert_close(y[-1], x[-1])
    if kind == "combinatorial":
        torch.testing.assert_close(y.sum(0), x.sum(0))
    # Each component is smoothed: differences along edges shrink.
    assert (laplacian.quadratic(y) < laplacian.quadratic(x)).all()


@NAMES
@BOTH
def test_nothing_leaks_between_nodes_that_no_path_joins(name, sparse):
    weight = torch.block_diag(random_weights(nodes=5), random_weights(nodes=4))
    order = torch.randperm(9)
    graph = Graph(weight[order][:, order], None, 9, ())
    graph = graph.to_sparse() if sparse else graph
    apart = torch.block_diag(torch.ones(5, 5), torch.ones(4, 4))[order][:, order] == 0
    assert not diffusion_operator(name, graph.laplacian(), 0.7).to_dense()[apart].any()


@NAMES
@KINDS
@BOTH
def test_a_batch_with_a_time_each_is_its_samples(name, kind, sparse):
    laplacian = laplacians(2, 3, kind=kind, sparse=sparse)
    eta = torch.rand(2, 3, dtype=torch.float64) / 5
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    y = diffusion_operator(name, laplacian, eta)(x)
    matrices = laplacian.to_dense()
    for i in range(2):
        for j in range(3):
            expected = slow(name, matrices[i, j], float(eta[i, j])) @ x[i, j]
            torch.testing.assert_close(y[i, j], expected, rtol=1e-12, atol=1e-12)


@NAMES
@BOTH
def test_expand_reshape_and_select_do_what_indexing_does(name, sparse):
    laplacian = laplacians(3, 1, sparse=sparse)
    rows = torch.tensor([2, 0, 2])
    for eta in (0.4, torch.tensor([[0.1], [0.2], [0.5]], dtype=torch.float64)):
        operator = diffusion_operator(name, laplacian, eta)
        full = operator.to_dense()
        same = {"rtol": 1e-13, "atol": 1e-13}
        torch.testing.assert_close(operator.expand((3, 2)).to_dense(), full.expand(3, 2, 6, 6), **same)
        chosen = operator.expand((3, 2)).reshape((-1,)).select(rows)
        assert chosen.batch == (3,)
        torch.testing.assert_close(chosen.to_dense(), full.expand(3, 2, 6, 6).reshape(6, 6, 6)[rows], **same)
        assert operator.reshape((3,)).select(rows[:0])(torch.zeros(0, 6, 2).double()).shape == (0, 6, 2)
        assert operator.is_sparse == sparse


@NAMES
@KINDS
@BOTH
def test_gradients_are_right_to_second_order(name, kind, sparse):
    values = (torch.rand(2, 6, dtype=torch.float64) + 0.1).requires_grad_()
    eta = torch.tensor([0.2, 0.3], dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    steps = 3 if name == "explicit" else 1

    def apply(values, eta, x):
        return diffusion_operator(name, from_upper(values, 4, sparse, (2,)).laplacian(kind), eta, steps)(x)

    assert gradcheck(apply, (values, eta, x))
    assert gradgradcheck(apply, (values, eta, x))


@NAMES
@KINDS
def test_gradients_of_features_agree_between_dense_and_sparse(name, kind):
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 9, 2, dtype=torch.float64, requires_grad=True)
    eta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def gradients(sparse):
        laplacian = KNN(3, sparse=sparse)(x).laplacian(kind)
        out = diffusion_operator(name, laplacian, eta)(y)
        first = torch.autograd.grad(out.square().sum(), (x, y, eta), create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), (x, y, eta))
        return out, *first, *second

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-9, atol=1e-10)


@NAMES
@KINDS
@BOTH
def test_gradients_are_right_where_eigenvalues_repeat(name, kind, sparse):
    # Two equal triangles and a lone node: each eigenvalue of the Laplacian is there more than once.
    triangle = torch.ones(3, 3, dtype=torch.float64)
    weight = torch.block_diag(triangle, triangle, torch.zeros(1, 1, dtype=torch.float64))
    weight.fill_diagonal_(0)
    graph = Graph(weight, None, 7, ()).to_sparse()
    pairs = graph.edge[:, graph.edge[0] < graph.edge[1]]
    values = torch.ones(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 2, dtype=torch.float64)

    def apply(values):
        made = Graph.from_edges(pairs, 7, values)
        made = made if sparse else made.to_dense()
        return diffusion_operator(name, made.laplacian(kind), 0.3)(x)

    assert gradcheck(apply, (values,))
    assert gradgradcheck(apply, (values,))


@pytest.mark.parametrize("name", ["heat", "implicit"])
@BOTH
def test_nan_in_one_graph_harms_no_other_also_in_the_gradient(name, sparse):
    weight = random_weights(3)
    weight[1, 0, 1] = weight[1, 1, 0] = torch.nan
    dense = Graph(weight, None, 6, (3,))
    graph = dense.to_sparse() if sparse else dense
    values = graph.weight.clone().requires_grad_()
    eta = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 6, 2, dtype=torch.float64)
    y = diffusion_operator(name, graph._replace(weight=values).laplacian(), eta)(x)
    grads = torch.autograd.grad(y[[0, 2]].square().sum(), (values, eta))
    good = Graph(weight[[0, 2]], None, 6, (2,)).laplacian()
    torch.testing.assert_close(y[[0, 2]], diffusion_operator(name, good, 0.5)(x[[0, 2]]))
    assert y[1].isnan().any()
    of_others = grads[0][graph.edge[0] // 6 != 1] if sparse else grads[0][[0, 2]]
    assert of_others.isfinite().all()
    assert of_others.any()
    assert grads[1][[0, 2]].isfinite().all()


def test_a_dense_matrix_that_is_not_positive_has_no_resolvent_and_harms_no_other():
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    graph = Graph(torch.stack([weight, -weight]), None, 2, (2,))
    made = implicit_euler(graph.laplacian("combinatorial"), 1.0).to_dense()
    assert made[1].isnan().all()
    torch.testing.assert_close(made[0], torch.tensor([[2.0, 1.0], [1.0, 2.0]]) / 3)


@NAMES
@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_also_under_autocast(name, sparse, dtype):
    graph = KNN(3, sparse=sparse)(torch.randn(20, 3).to(dtype))
    x = torch.randn(20, 4).to(dtype)
    operator = diffusion_operator(name, graph.laplacian(), 0.8)
    y = operator(x)
    assert y.dtype == dtype
    assert torch.equal(y, operator(x.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = diffusion_operator(name, graph.laplacian(), 0.8)
        assert torch.equal(again(x.float()), operator(x.float()))


@NAMES
@BOTH
def test_inputs_of_another_dtype_keep_theirs(name, sparse):
    operator = diffusion_operator(name, laplacians(sparse=sparse, dtype=torch.float32), 0.5)
    x = torch.randn(6, 2, dtype=torch.float64)
    assert operator(x).dtype == torch.float64
    torch.testing.assert_close(operator(x).float(), operator(x.float()))


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (2, 1, 2), (2, 5, 0)])
@NAMES
@BOTH
def test_empty_batches_sets_and_columns_pass_through(name, sparse, shape):
    graph = Graph(torch.zeros(shape[0], shape[1], shape[1]), None, shape[1], shape[:1])
    graph = graph.to_sparse() if sparse else graph
    x = torch.randn(shape, requires_grad=True)
    eta = torch.full(shape[:1], 0.5, requires_grad=True)
    for time in (0.5, eta):
        y = diffusion_operator(name, graph.laplacian(), time)(x)
        torch.testing.assert_close(y, x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


@NAMES
@BOTH
def test_operators_can_be_differentiated_and_vmapped_by_torch_func(name, sparse):
    laplacian = laplacians(sparse=sparse)
    x = torch.randn(3, 6, 2, dtype=torch.float64)
    operator = diffusion_operator(name, laplacian, 0.4)
    torch.testing.assert_close(torch.vmap(operator)(x), torch.stack([operator(one) for one in x]))

    def loss(eta):
        return diffusion_operator(name, laplacian, eta)(x[0]).square().sum()

    eta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.func.grad(loss)(eta.detach()), torch.autograd.grad(loss(eta), eta)[0])


@pytest.mark.parametrize("name", ["heat", "implicit"])
def test_dense_operators_can_be_vmapped_over_graphs(name):
    weight = random_weights(3)

    def apply(weight):
        return diffusion_operator(name, Graph(weight, None, 6, ()).laplacian(), 0.4).to_dense().square().sum()

    expected = torch.stack([apply(one) for one in weight])
    torch.testing.assert_close(torch.vmap(apply)(weight), expected)
    leaf = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sum(apply(one) for one in leaf), leaf)
    torch.testing.assert_close(torch.vmap(torch.func.grad(apply))(weight), grad)


def test_an_explicit_step_that_grows_is_refused_with_what_to_do():
    # An unnormalised step of .3 with five neighbours, as such layers are used: its spectral radius is above 1.
    graph = KNN(5)(torch.randn(50, 8).abs())
    laplacian = graph.laplacian("combinatorial")
    top = float(torch.linalg.eigvalsh(laplacian.to_dense())[-1])
    assert 0.3 * top - 1 > 1
    with pytest.raises(
        ValueError, match=r"eta / steps = 0.3 is above 2 / bound = .* take steps=\d+ or more"
    ) as error:
        explicit_euler(laplacian, 0.3)
    enough = int(str(error.value).split("steps=")[1].split()[0])
    matrix = explicit_euler(laplacian, 0.3, enough).to_dense()
    assert torch.linalg.matrix_norm(matrix, ord=2) <= 1 + 1e-5
    with pytest.raises(ValueError, match="above 2 / bound"):
        explicit_euler(laplacian, 0.3, enough - 1)


def test_the_unstable_graph_of_a_batch_is_the_one_named():
    laplacian = Graph(torch.stack([random_weights() * 0, random_weights() * 100]), None, 6, (2,)).laplacian(
        "combinatorial"
    )
    limit = 2 / float(laplacian.bound[1])
    with pytest.raises(ValueError, match=f"bound = {limit:.4g} of this graph"):
        explicit_euler(laplacian, 1.0)
    assert explicit_euler(laplacian, torch.tensor([1.0, limit], dtype=torch.float64)).batch == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heats", 1.0), "diffusion operator 'heats' is not one of.*Did you mean 'heat'"),
        (("heat", 1.0, 2), "steps=2 needs the operator 'explicit'"),
        (("implicit", 1.0, True), "steps=True"),
        (("explicit", 1.0, 0), "steps must be a whole number of at least 1, got 0"),
        (("heat", -1.0), "eta must be >= 0, got -1.0"),
        (("heat", math.nan), "eta must be finite"),
        (("implicit", torch.tensor([1.0, -1.0])), "eta must be >= 0"),
        (("implicit", torch.ones(3)), r"one entry a graph, \(2,\), got shape \(3,\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    name, *others = arguments
    with pytest.raises(ValueError, match=message):
        diffusion_operator(name, laplacians(2), *others)


def test_inputs_and_times_of_a_wrong_kind_are_refused():
    for sparse in (False, True):
        operator = implicit_euler(laplacians(2, sparse=sparse), 1.0)
        with pytest.raises(ValueError, match=r"batch \(2,\) and N 6.*fit the graph with .expand\(batch\)"):
            operator(torch.zeros(6, 3, dtype=torch.float64))
        with pytest.raises(TypeError, match="x must have a floating-point dtype"):
            operator(torch.zeros(2, 6, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="eta must be a number or a tensor"):
        heat_kernel(laplacians(2), "1")
