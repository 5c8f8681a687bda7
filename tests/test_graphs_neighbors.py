"""Graphs of nearest neighbours against plain Python loops: ties, masks, order of nodes, gradients, memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hopdeq_lwpf.graphs import KNN
from hopdeq_lwpf.graphs import neighbors as module

BOTH = pytest.mark.parametrize("sparse", [False, True])
ALL = [KNN(2), KNN(2, symmetrize="mean"), KNN(2, "rbf"), KNN(2, "rbf", 1.5, "mean")]
CASES = pytest.mark.parametrize("knn", ALL, ids=["max", "mean", "median", "bandwidth"])


def form(knn, sparse):
    """The same neighbours as a dense or a sparse graph."""
    return KNN(knn.neighbors, knn.similarity, knn.bandwidth, knn.symmetrize, sparse, knn.detach)


def slow_knn(features, knn, mask=None):
    """The weights of one graph in Python floats; similarities that agree to 1e-9 are ties."""
    x = features.tolist()
    nodes = [i for i in range(len(x)) if mask is None or not mask[i]]

    def cosine(a, b):
        norms = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        return sum(v * w for v, w in zip(a, b, strict=True)) / norms if norms else 0.0

    def distance(a, b):
        return math.sqrt(sum((v - w) ** 2 for v, w in zip(a, b, strict=True)))

    def close(i, j):
        return cosine(x[i], x[j]) if knn.similarity == "cosine" else -distance(x[i], x[j])

    chosen, reach = set(), []
    for i in nodes:
        others = sorted((close(i, j) for j in nodes if j != i), reverse=True)
        last = others[min(knn.neighbors, len(others)) - 1] if others else None
        if others:
            reach.append(-last)
        chosen |= {(i, j) for j in nodes if j != i and close(i, j) >= last - 1e-9}
    bandwidth = knn.bandwidth or (sorted(reach)[(len(reach) - 1) // 2] if reach else 1.0)

    def similarity(i, j):
        if knn.similarity == "cosine":
            return max(close(i, j), 0.0)
        if bandwidth == 0:
            return 1.0 if distance(x[i], x[j]) == 0 else 0.0
        return math.exp(-(distance(x[i], x[j]) ** 2) / (2 * bandwidth**2))

    weight = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i, j in chosen:
        share = 1.0 if knn.symmetrize == "max" or (j, i) in chosen else 0.5
        if similarity(i, j) > 1e-9:
            weight[i, j] = weight[j, i] = share * similarity(i, j)
    return weight


@st.composite
def features(draw):
    """Small integers: many ties, equal rows, rows of zeros."""
    nodes, width = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    entries = draw(st.lists(st.integers(-1, 1), min_size=nodes * width, max_size=nodes * width))
    return torch.tensor(entries, dtype=torch.float64).view(nodes, width)


@CASES
@settings(max_examples=50)
@given(features())
def test_graphs_follow_their_definition_also_where_ties_are_the_rule(knn, x):
    expected = slow_knn(x, knn)
    for sparse in (False, True):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            weight = form(knn, sparse)(x.to(dtype)).to_dense().weight
            assert weight.dtype == dtype
            torch.testing.assert_close(weight.double(), expected, rtol=tolerance, atol=tolerance)


@CASES
@BOTH
def test_random_graphs_follow_their_definition_and_a_batch_is_its_samples(knn, sparse):
    x = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    graph = form(knn, sparse)(x)
    assert graph.batch == (2, 3)
    assert graph.is_sparse == sparse
    weight = graph.to_dense().weight
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(weight[i, j], slow_knn(x[i, j], knn), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(form(knn, sparse)(x[i, j]).to_dense().weight, weight[i, j])
    assert torch.equal(weight, weight.mT)


@CASES
@BOTH
def test_masked_nodes_are_isolated_whatever_they_hold(knn, sparse):
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 5:] = True
    mask[1, 0] = True
    padded = x.masked_fill(mask.unsqueeze(-1), torch.nan).requires_grad_()
    weight = form(knn, sparse)(padded, mask).to_dense().weight
    torch.testing.assert_close(weight[0, :5, :5], form(knn, sparse)(x[0, :5]).to_dense().weight)
    assert not weight[mask].any()
    for i in range(2):
        expected = slow_knn(x[i], knn, mask[i])
        torch.testing.assert_close(weight[i].detach(), expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(weight.square().sum(), padded)
    assert grad.isfinite().all()
    assert not grad[mask].any()
    assert grad[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
@BOTH
def test_the_graph_of_bit_patterns_does_not_depend_on_the_order_of_nodes(sparse, similarity, dtype):
    bits = torch.randint(0, 2, (40, 9)).to(dtype)
    order = torch.randperm(40)
    knn = KNN(3, similarity, sparse=sparse)
    one, other = knn(bits).to_dense().weight, knn(bits[order]).to_dense().weight
    assert torch.equal((one > 0)[order][:, order], other > 0)
    torch.testing.assert_close(one[order][:, order], other)
    expected = slow_knn(bits, knn)
    torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5)
    # An arbitrary choice of three would leave the last of the ties out.
    assert (expected > 0).sum() > 40 * 5


@BOTH
def test_orthogonal_patterns_have_no_edge_through_rounding(sparse):
    # Normalised by 1 / sqrt(7), products of these rows need not cancel exactly.
    x = torch.tensor([[1.0, 1, 1, 1, 1, 1, -3], [1, 1, 1, 0, 0, 0, 1], [3, -1, -1, 2, 2, -3, 1]])
    for dtype in (torch.float32, torch.float64):
        assert not KNN(2, sparse=sparse)(torch.stack([x[0], x[1]]).to(dtype)).connected().any()


@BOTH
def test_opposite_and_zero_vectors_are_similar_to_nothing(sparse):
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 0.0], [1.0, 0.1]], requires_grad=True)
    graph = KNN(3, sparse=sparse)(x)
    assert graph.connected().sum() == 2
    (grad,) = torch.autograd.grad(graph.weight.sum(), x)
    assert grad.isfinite().all()
    assert not grad[2].any()


@BOTH
def test_a_rounding_tie_is_a_tie_and_a_difference_is_none(sparse):
    angles = torch.tensor([0.0, 0.3, -0.3, 0.301], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], -1).float()
    chosen = KNN(1, sparse=sparse, symmetrize="mean")(x).to_dense().weight[0]
    assert (chosen > 0).tolist() == [False, True, True, False]


@BOTH
def test_fewer_others_than_neighbours_are_all_joined(sparse):
    x = torch.rand(4, 3) + 0.1
    assert KNN(10, sparse=sparse)(x).connected().sum() == 12
    assert not KNN(10, sparse=sparse)(x[:1]).connected().any()


def test_without_a_number_of_neighbours_every_pair_is_joined():
    x = torch.randn(5, 3, dtype=torch.float64)
    weight = KNN(None, "rbf", 0.7)(x).weight
    expected = (-torch.cdist(x, x).square() / (2 * 0.7**2)).exp().fill_diagonal_(0)
    torch.testing.assert_close(weight, expected)
    unit = x / x.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(KNN(None)(x).weight, (unit @ unit.T).clamp_min(0).fill_diagonal_(0))


@BOTH
def test_far_from_the_origin_distances_keep_their_digits(sparse):
    x = torch.randn(12, 3, dtype=torch.float64)
    near, far = KNN(3, "rbf", sparse=sparse)(x).to_dense(), KNN(3, "rbf", sparse=sparse)(x + 1e5).to_dense()
    # x + 1e5 itself rounds the differences by 1e-11.
    torch.testing.assert_close(near.weight, far.weight, rtol=1e-9, atol=1e-9)


@BOTH
def test_cosines_do_not_overflow(sparse):
    x = torch.randn(6, 3)
    for scale in (1e30, 1e-30):
        torch.testing.assert_close(
            KNN(2, sparse=sparse)(x * scale).to_dense().weight, KNN(2, sparse=sparse)(x).to_dense().weight
        )


@BOTH
def test_nodes_that_coincide_with_their_neighbours_are_joined_to_those_alone(sparse):
    # In products of these numbers the distances of equal rows are not exactly 0.
    rows = 3 * torch.randn(20, 3, 33, dtype=torch.float64)
    x = rows[:, [0, 0, 0, 0, 1, 2]].requires_grad_()
    graph = KNN(2, "rbf", sparse=sparse)(x)
    weight = graph.to_dense().weight
    assert torch.equal(weight[:, :4, :4], (1 - torch.eye(4, dtype=torch.float64)).expand(20, 4, 4))
    assert not weight[:, 4:].any()
    if weight.requires_grad:
        (grad,) = torch.autograd.grad(weight.sum(), x)
        assert not grad.any()


@BOTH
def test_detached_graphs_have_no_gradient_and_others_do(sparse):
    x = torch.randn(6, 3, requires_grad=True)
    assert not KNN(2, sparse=sparse, detach=True)(x).weight.requires_grad
    assert KNN(2, sparse=sparse)(x).weight.requires_grad


@pytest.mark.parametrize("knn", [KNN(2), KNN(2, symmetrize="mean"), KNN(2, "rbf", 1.0)])
@BOTH
def test_gradients_of_weights_are_right_to_second_order(knn, sparse):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def weights(x):
        return form(knn, sparse)(x).weight

    assert gradcheck(weights, (x,))
    assert gradgradcheck(weights, (x,))


@BOTH
def test_the_bandwidth_that_is_the_median_has_no_gradient(sparse):
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = KNN(2, "rbf", sparse=sparse)(x).weight
    with torch.no_grad():
        reach = torch.cdist(x, x).sort(-1).values[:, 2].median()
    fixed = KNN(2, "rbf", float(reach), sparse=sparse)(x).weight
    torch.testing.assert_close(weight, fixed)
    torch.testing.assert_close(
        torch.autograd.grad(weight.square().sum(), x), torch.autograd.grad(fixed.square().sum(), x)
    )


@CASES
@BOTH
def test_nan_in_one_sample_makes_its_weights_nan_and_harms_no_other(knn, sparse):
    x = torch.randn(3, 6, 2, dtype=torch.float64)
    good = form(knn, sparse)(x[[0, 2]])
    x[1, 4, 0] = torch.nan
    x.requires_grad_()
    graph = form(knn, sparse)(x)
    weight = graph.to_dense().weight
    torch.testing.assert_close(weight[[0, 2]], good.to_dense().weight)
    assert weight[1].isnan().any()
    (grad,) = torch.autograd.grad(weight[[0, 2]].square().sum(), x)
    assert grad[[0, 2]].isfinite().all()
    assert grad[[0, 2]].any()


@BOTH
def test_half_precision_features_make_the_graph_of_the_same_numbers_in_float32(sparse):
    x = torch.randn(6, 3).bfloat16()
    knn = KNN(2, sparse=sparse)
    graph = knn(x)
    assert graph.weight.dtype == torch.float32
    assert torch.equal(graph.weight, knn(x.float()).weight)
    with torch.autocast("cpu"):
        assert torch.equal(knn(x.float()).weight, graph.weight)


@BOTH
@pytest.mark.parametrize("similarity", ["cosine", "rbf"])
def test_empty_batches_and_empty_sets_make_empty_graphs(sparse, similarity):
    knn = KNN(2, similarity, sparse=sparse)
    for shape in ((0, 5, 3), (2, 0, 3), (2, 1, 3), (0, 0, 3)):
        graph = knn(torch.randn(shape), torch.zeros(shape[:2], dtype=torch.bool))
        assert graph.connected().shape == (*shape[:2], shape[1])
        assert not graph.connected().any()


@BOTH
def test_blocks_do_not_change_the_graph(sparse, monkeypatch):
    x = torch.randint(0, 2, (5, 13, 6)).float()
    for similarity in ("cosine", "rbf"):
        whole = KNN(3, similarity, sparse=sparse)(x)
        for block in (20, 200, 500):
            monkeypatch.setattr(module, "BLOCK", block)
            assert torch.equal(KNN(3, similarity, sparse=sparse)(x).weight, whole.weight)
        monkeypatch.undo()


def test_auto_is_sparse_for_many_nodes_with_neighbours_to_count():
    x = torch.randn(module.SPARSE_FROM, 3)
    assert KNN()(x).is_sparse
    assert not KNN()(x[1:]).is_sparse
    assert not KNN(None)(x).is_sparse
    assert not KNN(sparse=False)(x).is_sparse


class Largest(TorchDispatchMode):
    """The most entries that any tensor has which is made inside."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *made])
        return out


def test_sparse_graphs_of_many_nodes_make_no_matrix_of_all_pairs():
    x = torch.randn(4000, 4, requires_grad=True)
    with Largest() as seen:
        graph = KNN(5, sparse=True)(x)
        graph.weight.sum().backward()
    assert seen.entries <= module.BLOCK < 4000**2
    with Largest() as seen:
        KNN(5, sparse=False)(x[:100].detach())
    assert seen.entries == 100**2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neighbors": 0}, "neighbors must be a whole number of at least 1, got 0"),
        ({"neighbors": 2.5}, "whole number"),
        ({"similarity": "cosin"}, "Did you mean 'cosine'"),
        ({"symmetrize": "min"}, "symmetrize 'min' is not one of"),
        ({"similarity": "rbf", "bandwidth": 0.0}, "bandwidth must be above 0, got 0.0"),
        ({"bandwidth": 1.0}, "bandwidth belongs to similarity='rbf'"),
        ({"similarity": "rbf", "neighbors": None}, "give bandwidth or neighbors"),
        ({"sparse": True, "neighbors": None}, "sparse=True needs neighbors"),
        ({"sparse": "yes"}, "sparse must be 'auto', True or False, got 'yes'"),
        ({"detach": "no"}, "detach must be True or False"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KNN(**arguments)


def test_features_and_masks_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="features must have a floating-point dtype"):
        KNN()(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"features must be \(\*batch, N, d\), got shape \(3,\)"):
        KNN()(torch.zeros(3))
    with pytest.raises(ValueError, match=r"mask must have one entry a node, shape \(2, 3\), got \(3,\)"):
        KNN()(torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.bool))
