"""Graphs and Laplacians against plain Python, dense against sparse, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

from hopdeq_lwpf.graphs import LAPLACIANS, Graph

KINDS = pytest.mark.parametrize("kind", LAPLACIANS)


def slow_laplacian(weight, kind):
    """The matrix of one graph from its definition, entry by entry, in Python floats."""
    w = weight.tolist()
    n = len(w)
    degree = [sum(row) for row in w]
    matrix = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            entry = (degree[i] if i == j else 0.0) - w[i][j]
            if kind == "normalized":
                if degree[i] == 0 or degree[j] == 0:
                    entry = 0.0
                else:
                    entry /= (degree[i] * degree[j]) ** 0.5
            matrix[i][j] = entry
    return torch.tensor(matrix, dtype=torch.float64).view(n, n)


def random_weights(*batch, nodes=6, share=0.5, dtype=torch.float64):
    """Symmetric weights; the last node of each graph is isolated."""
    some = torch.rand(*batch, nodes, nodes, dtype=dtype)
    some = (some * (torch.rand(*batch, nodes, nodes) < share)).triu(1)
    some[..., -1] = 0
    return some + some.mT


@st.composite
def weights(draw):
    """Symmetric matrices with zeros, equal entries and entries of very different size."""
    nodes = draw(st.integers(1, 7))
    count = nodes * (nodes - 1) // 2
    values = draw(
        st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 1e-6, 0.3, 50.0]), min_size=count, max_size=count)
    )
    weight = torch.zeros(nodes, nodes, dtype=torch.float64)
    row, column = torch.triu_indices(nodes, nodes, 1)
    weight[row, column] = torch.tensor(values, dtype=torch.float64)
    return weight + weight.T


def from_upper(values, nodes, sparse, batch=()):
    """A graph whose weights are given once an edge, (*batch, N (N - 1) / 2)."""
    row, column = torch.triu_indices(nodes, nodes, 1)
    place = (row * nodes + column).expand(*batch, -1)
    flat = values.new_zeros(*batch, nodes * nodes).scatter(-1, place, values)
    weight = flat.view(*batch, nodes, nodes)
    graph = Graph(weight + weight.mT, None, nodes, tuple(batch))
    return graph.to_sparse() if sparse else graph


def test_a_dense_graph_ignores_the_diagonal_and_isolates_masked_nodes_that_hold_nan():
    weight = random_weights(2, 3)
    given_weight = weight.clone() + 7 * torch.eye(6)
    mask = torch.zeros(2, 3, 6, dtype=torch.bool)
    mask[1, 2, 0] = True
    given_weight[1, 2, 0, :] = torch.nan
    given_weight[1, 2, :, 0] = torch.nan
    graph = Graph.from_adjacency(given_weight, mask)
    weight[1, 2, 0, :] = weight[1, 2, :, 0] = 0
    assert torch.equal(graph.weight, weight)
    assert graph.batch == (2, 3)
    assert graph.nodes == 6


def test_masked_nodes_get_no_gradient_also_where_they_hold_nan():
    weight = random_weights(1)
    weight[0, 1, :] = weight[0, :, 1] = torch.nan
    weight.requires_grad_()
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, 1] = True
    graph = Graph.from_adjacency(weight, mask)
    (grad,) = torch.autograd.grad(graph.laplacian().to_dense().square().sum(), weight)
    assert grad.isfinite().all()
    assert not grad[0, 1].any()
    assert grad.any()


def test_a_bool_adjacency_has_weights_of_one_in_the_dtype_asked_for():
    some = random_weights() > 0
    assert Graph.from_adjacency(some).weight.dtype == torch.float32
    graph = Graph.from_adjacency(some, dtype=torch.float64)
    assert torch.equal(graph.weight, some.double())
    assert torch.equal(graph.connected(), some)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([[0.0, 1.0], [2.0, 0.0]], ValueError, r"symmetric: entry \[0, 1\].*differ by 1.*torch.maximum"),
        ([[0.0, -1.0], [-1.0, 0.0]], ValueError, r"weight must be >= 0; entry \[0, 1\] is -1"),
        ([[0.0, float("inf")], [1.0, 0.0]], ValueError, r"finite; entry \[0, 1\] is inf"),
        ([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], ValueError, r"square \(\*batch, N, N\), got shape \(2, 3\)"),
        ([1.0], ValueError, "square"),
        ([[0, 1], [1, 0]], TypeError, "floating-point"),
    ],
)
def test_adjacencies_that_are_none_are_refused(weight, error, message):
    with pytest.raises(error, match=message):
        Graph.from_adjacency(torch.tensor(weight))


def test_weights_that_differ_by_rounding_are_made_symmetric():
    weight = torch.tensor([[0.0, 1.0], [1.0 + 2**-23, 0.0]])
    made = Graph.from_adjacency(weight).weight
    assert torch.equal(made, made.T)


def test_masks_of_a_wrong_shape_or_dtype_are_refused():
    with pytest.raises(ValueError, match=r"one entry a node, shape \(6,\), got \(5,\)"):
        Graph.from_adjacency(random_weights(), torch.zeros(5, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool tensor"):
        Graph.from_adjacency(random_weights(), torch.zeros(6))


def test_an_edge_given_once_or_in_both_directions_is_the_same():
    once = Graph.from_edges(torch.tensor([[0, 2, 3], [1, 1, 3]]), 5, torch.tensor([0.5, 2.0, 9.0]))
    both = Graph.from_edges(torch.tensor([[1, 2, 0], [0, 1, 1]]), 5, torch.tensor([0.5, 2.0, 0.5]))
    expected = torch.zeros(5, 5)
    expected[0, 1] = expected[1, 0] = 0.5
    expected[1, 2] = expected[2, 1] = 2.0
    for graph in (once, both):
        assert torch.equal(graph.to_dense().weight, expected)
        assert graph.edge.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
        assert graph.batch == ()


def test_edges_without_weights_weigh_one():
    graph = Graph.from_edges(torch.tensor([[0], [1]]), 2)
    assert graph.weight.tolist() == [1.0, 1.0]
    assert graph.weight.dtype == torch.float32
    assert Graph.from_edges(torch.tensor([[0], [1]]), 2, dtype=torch.float64).weight.dtype == torch.float64


def test_the_gradient_of_an_edge_given_twice_reaches_both_weights():
    weight = torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    graph = Graph.from_edges(torch.tensor([[0, 1, 1], [1, 0, 2]]), 3, weight)
    (grad,) = torch.autograd.grad(graph.degree[0], weight)
    assert grad.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("edge", "weight", "error", "message"),
    [
        ([[0], [5]], None, ValueError, r"from 0 to nodes - 1 = 4, got 5"),
        ([[-1], [2]], None, ValueError, r"got -1"),
        ([[0, 0], [1, 1]], None, ValueError, r"names \[0, 1\] twice"),
        ([[0, 1], [1, 0]], [1.0, 2.0], ValueError, r"same in both directions.*\[0, 1\] differ"),
        ([[0, 1], [1, 2]], [1.0], ValueError, r"one entry an edge, \(2,\), got shape \(1,\)"),
        ([[0], [1]], [-1.0], ValueError, "weight must be >= 0"),
        ([[0], [1]], [float("nan")], ValueError, "weight must be finite"),
        ([[0], [1]], [1], TypeError, "floating-point"),
        ([[0.0], [1.0]], None, TypeError, "int64 tensor"),
        ([0, 1], None, ValueError, r"\(2, E\)"),
    ],
)
def test_edges_that_make_no_graph_are_refused(edge, weight, error, message):
    weight = None if weight is None else torch.tensor(weight)
    with pytest.raises(error, match=message):
        Graph.from_edges(torch.tensor(edge), 5, weight)


def test_a_number_of_nodes_that_is_none_is_refused():
    with pytest.raises(ValueError, match="whole number of at least 0, got -1"):
        Graph.from_edges(torch.zeros(2, 0, dtype=torch.int64), -1)


def test_sparse_and_dense_graphs_are_the_same():
    dense = Graph(random_weights(2, 3), None, 6, (2, 3))
    sparse = dense.to_sparse()
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    assert sparse.is_sparse
    assert not dense.is_sparse
    assert torch.equal(sparse.to_dense().weight, dense.weight)
    assert torch.equal(sparse.connected(), dense.connected())
    torch.testing.assert_close(sparse.degree, dense.degree)
    torch.testing.assert_close(sparse.times(x), dense.times(x))
    torch.testing.assert_close(dense.times(x), torch.einsum("abij,abjc->abic", dense.weight, x))
    again = sparse.to_dense().to_sparse()
    assert torch.equal(again.edge, sparse.edge)
    assert torch.equal(again.weight, sparse.weight)


@pytest.mark.parametrize("sparse", [False, True])
def test_expand_reshape_and_select_do_what_indexing_does(sparse):
    dense = Graph(random_weights(3, 1), None, 6, (3, 1))
    graph = dense.to_sparse() if sparse else dense
    rows = torch.tensor([2, 0, 2, 1])
    expanded = graph.expand((3, 2))
    assert expanded.batch == (3, 2)
    assert torch.equal(expanded.to_dense().weight, dense.weight.expand(3, 2, 6, 6))
    flat = expanded.reshape((-1,))
    assert flat.batch == (6,)
    assert torch.equal(flat.to_dense().weight, dense.weight.expand(3, 2, 6, 6).reshape(6, 6, 6))
    assert torch.equal(
        graph.reshape((3,)).select(rows).to_dense().weight, dense.weight.reshape(3, 6, 6)[rows]
    )
    assert graph.reshape((3,)).select(rows[:0]).to_dense().weight.shape == (0, 6, 6)
    assert graph.reshape((3,)).unsqueeze(-1).batch == (3, 1)
    assert graph.unsqueeze(0).batch == (1, 3, 1)
    laplacian = graph.laplacian("combinatorial")
    full = laplacian.to_dense()
    assert torch.equal(laplacian.expand((3, 2)).to_dense(), full.expand(3, 2, 6, 6))
    chosen = laplacian.reshape((3,)).select(rows)
    assert torch.equal(chosen.to_dense(), full.reshape(3, 6, 6)[rows])
    torch.testing.assert_close(chosen.bound, laplacian.bound.reshape(3)[rows])
    assert chosen.batch == (4,)


@pytest.mark.parametrize("sparse", [False, True])
def test_one_graph_serves_a_batch(sparse):
    dense = Graph(random_weights(), None, 6, ())
    graph = dense.to_sparse() if sparse else dense
    assert torch.equal(graph.expand((2, 3)).to_dense().weight, dense.weight.expand(2, 3, 6, 6))
    if sparse:
        wide = graph.expand((2, 3))
        assert (wide.edge[0].diff() >= 0).all()
        assert wide.weight.shape == (6 * graph.weight.shape[0],)


def test_shapes_that_do_not_fit_are_refused():
    graph = Graph(random_weights(2), None, 6, (2,))
    for some in (graph, graph.to_sparse()):
        with pytest.raises(ValueError, match=r"x must be \(\*batch, N, c\) with batch \(2,\) and N 6"):
            some.times(torch.zeros(3, 6, 1, dtype=torch.float64))
        with pytest.raises(ValueError, match="batch of one dimension"):
            some.reshape((1, 2)).select(torch.tensor([0]))
        with pytest.raises(RuntimeError, match="expanded size"):
            some.expand((3,))
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            some.reshape((3,))


def test_graphs_and_laplacians_are_pytrees_of_their_tensors():
    sparse = Graph(random_weights(2), None, 6, (2,)).to_sparse()
    moved = pytree.tree_map(lambda leaf: leaf * 1 if isinstance(leaf, torch.Tensor) else leaf, sparse)
    assert isinstance(moved, Graph)
    laplacian = pytree.tree_map(lambda leaf: leaf, sparse.laplacian())
    assert torch.equal(laplacian.to_dense(), sparse.laplacian().to_dense())


@KINDS
@given(weights())
def test_laplacians_follow_their_definition_and_no_eigenvalue_passes_the_bound(kind, weight):
    dense = Graph(weight, None, len(weight), ())
    for graph in (dense, dense.to_sparse()):
        laplacian = graph.laplacian(kind)
        expected = slow_laplacian(weight, kind)
        torch.testing.assert_close(laplacian.to_dense(), expected, rtol=1e-13, atol=1e-13)
        values = torch.linalg.eigvalsh(laplacian.to_dense())
        # eigvalsh itself rounds by a few eps of the largest eigenvalue.
        assert values[-1] <= laplacian.bound * (1 + 1e-14)
        assert values[0] >= -1e-14 * max(1.0, float(laplacian.bound))
        torch.testing.assert_close(laplacian.bound, dense.laplacian(kind).bound)


@KINDS
def test_the_bound_is_met_by_a_complete_bipartite_graph(kind):
    weight = torch.zeros(8, 8)
    weight[:4, 4:] = weight[4:, :4] = 0.3
    laplacian = Graph(weight, None, 8, ()).laplacian(kind)
    top = float(torch.linalg.eigvalsh(laplacian.to_dense().double())[-1])
    assert top <= float(laplacian.bound) * (1 + 1e-7)
    assert float(laplacian.bound) <= top * (1 + 4e-6)


@KINDS
@pytest.mark.parametrize("sparse", [False, True])
def test_a_laplacian_multiplies_and_its_quadratic_form_sums_squared_differences(kind, sparse):
    dense = Graph(random_weights(2), None, 6, (2,))
    laplacian = (dense.to_sparse() if sparse else dense).laplacian(kind)
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    expected = torch.zeros(2, dtype=torch.float64)
    degree = dense.degree
    for b in range(2):
        for i in range(6):
            for j in range(i):
                one, other = x[b, i], x[b, j]
                if kind == "normalized" and dense.weight[b, i, j] > 0:
                    one, other = one / degree[b, i].sqrt(), other / degree[b, j].sqrt()
                expected[b] += dense.weight[b, i, j] * (one - other).square().sum()
    torch.testing.assert_close(laplacian.quadratic(x), expected)
    torch.testing.assert_close(laplacian.times(x), laplacian.to_dense() @ x)
    assert not laplacian.times(x)[:, -1].any()  # the isolated node
    assert laplacian.quadratic(x.bfloat16()).dtype == torch.float64
    assert laplacian.times(x.bfloat16()).dtype == torch.bfloat16


def test_laplacians_of_half_precision_are_made_in_float32():
    weight = random_weights(dtype=torch.float32).bfloat16()
    laplacian = Graph(weight, None, 6, ()).laplacian()
    torch.testing.assert_close(laplacian.to_dense().double(), slow_laplacian(weight, "normalized"))
    assert laplacian.to_dense().dtype == torch.float32


def test_misspelt_laplacians_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'normalized'"):
        Graph(random_weights(), None, 6, ()).laplacian("normalised")


@pytest.mark.parametrize("sparse", [False, True])
@KINDS
def test_gradients_of_laplacians_are_right_to_second_order(kind, sparse):
    # All weights above 0: sparse and dense then have the same parameters.
    values = (torch.rand(2, 6, dtype=torch.float64) + 0.1).requires_grad_()
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)

    def both(values, x):
        laplacian = from_upper(values, 4, sparse, (2,)).laplacian(kind)
        return laplacian.times(x), laplacian.quadratic(x)

    assert gradcheck(both, (values, x))
    assert gradgradcheck(both, (values, x))


def test_isolated_nodes_have_finite_gradients():
    weight = random_weights()
    for graph in (Graph(weight, None, 6, ()), Graph(weight, None, 6, ()).to_sparse()):
        values = graph.weight.clone().requires_grad_()
        laplacian = graph._replace(weight=values).laplacian()
        (grad,) = torch.autograd.grad(laplacian.quadratic(torch.randn(6, 2, dtype=torch.float64)), values)
        assert grad.isfinite().all()
        assert grad.any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)])
@KINDS
def test_empty_batches_and_graphs_without_edges_pass_through(kind, shape):
    dense = Graph(torch.zeros(*shape, shape[1]), None, shape[1], shape[:1])
    x = torch.randn(*shape, 3)
    for graph in (dense, dense.to_sparse()):
        laplacian = graph.laplacian(kind)
        assert torch.equal(graph.times(x), torch.zeros_like(x))
        assert torch.equal(laplacian.times(x), torch.zeros_like(x))
        assert laplacian.bound.shape == shape[:1]
        assert laplacian.select(torch.arange(shape[0])).batch == shape[:1]
        assert graph.connected().shape == (*shape, shape[1])


def test_nan_in_one_graph_harms_no_other():
    weight = random_weights(3)
    weight[1, 0, 1] = weight[1, 1, 0] = torch.nan
    x = torch.randn(3, 6, 2, dtype=torch.float64)
    for graph in (Graph(weight, None, 6, (3,)), Graph(weight, None, 6, (3,)).to_sparse()):
        y = graph.laplacian("combinatorial").times(x)
        alone = Graph(weight[[0, 2]], None, 6, (2,)).laplacian("combinatorial").times(x[[0, 2]])
        torch.testing.assert_close(y[[0, 2]], alone)
        assert y[1].isnan().any()
