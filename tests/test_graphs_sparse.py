"""Products of sparse matrices against dense ones, with gradients of every order."""

import torch
from test_graphs import random_weights
from torch.autograd import gradcheck, gradgradcheck

from hopdeq_lwpf.graphs import Graph
from hopdeq_lwpf.graphs.sparse import dots, product


def pattern():
    graph = Graph(random_weights() + 0.1, None, 6, ()).to_sparse()
    offsets = torch.searchsorted(graph.edge[0].contiguous(), torch.arange(7))
    return graph.edge, offsets, graph.weight.shape[0]


def test_sparse_products_without_symmetry_have_right_gradients_to_second_order():
    edge, offsets, count = pattern()
    weight = torch.randn(count, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (lambda w, x: product(w, x, edge, offsets, False), (weight, x)),
        (lambda x, y: dots(x, y, edge, offsets), (x, y)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_blocks_do_not_change_the_products_of_edges(monkeypatch):
    edge, offsets, _ = pattern()
    x, y = torch.randn(2, 6, 3, dtype=torch.float64)
    whole = dots(x, y, edge, offsets)
    monkeypatch.setattr("hopdeq_lwpf.graphs.sparse.BLOCK", 7)
    assert torch.equal(dots(x, y, edge, offsets), whole)
    torch.testing.assert_close(whole, torch.stack([x[i] @ y[j] for i, j in edge.T.tolist()]))


def test_sparse_products_can_be_vmapped():
    edge, offsets, count = pattern()
    weight = torch.randn(4, count, dtype=torch.float64)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    many = torch.vmap(lambda x: product(weight[0], x, edge, offsets))(x)
    torch.testing.assert_close(many, torch.stack([product(weight[0], one, edge, offsets) for one in x]))
    each = torch.vmap(lambda w, x: product(w, x, edge, offsets))(weight, x)
    torch.testing.assert_close(
        each, torch.stack([product(w, one, edge, offsets) for w, one in zip(weight, x, strict=True)])
    )
    pairs = torch.vmap(lambda x: dots(x, x, edge, offsets))(x)
    torch.testing.assert_close(pairs, torch.stack([dots(one, one, edge, offsets) for one in x]))
