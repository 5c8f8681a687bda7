"""Diffusion at the edges: nothing stored, nothing asked, NaN, padding in given graphs, weights that are 0."""

import pytest
import torch
from references_diffusion import F64
from test_diffusion import TIGHT, sample
from test_diffusion_layers import OPTIONS, STEPS, bags, layer_of
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hopdeq_lwpf import Termination
from hopdeq_lwpf.graphs import KNN, Graph
from hopdeq_lwpf.graphs import neighbors as neighbor_search
from hopdeq_lwpf.models.diffusion import DiffusionLayer, DiffusionPooling, function, retrieve_on_graph

# Most of these solve from a start that would train, to look at what is computed.
pytestmark = pytest.mark.filterwarnings("ignore:z0 was detached")


@pytest.mark.parametrize("options", [{}, {"beta": 500.0}, {"separation": "sparsemax"}])
@pytest.mark.parametrize("masked", [False, True])
def test_adaptive_eta_has_a_gradient_where_patterns_have_no_weight(options, masked):
    layer = layer_of(adaptive_eta=True, learn_eta=True, eta=0.5, inject="input", neighbors=2, **options)
    data = bags(2, 5).requires_grad_()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = masked
    layer(data, mask).square().sum().backward()
    assert bool(data.grad.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


def test_adaptive_eta_passes_gradcheck_beside_masked_patterns():
    layer = layer_of(adaptive_eta=True, learn_eta=True, eta=0.5, neighbors=2, beta=0.5)
    mask = torch.tensor([[False] * 3 + [True], [False] * 4])
    data = bags(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: layer(data, mask), (data, layer.eta.raw), atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("steps", [1, None])
def test_nan_in_one_sample_harms_no_other(name, steps):
    layer = layer_of(steps=steps, eta=0.5, on_failure="ignore", **{"neighbors": 2, **OPTIONS[name]})
    data = bags(3)
    plain = layer(data)
    data[1, 2] = torch.nan
    harmed = layer(data)
    assert_close(harmed[[0, 2]], plain[[0, 2]], rtol=1e-9, atol=1e-11)
    assert bool(harmed[1, 2].isnan().all())


@pytest.mark.filterwarnings("ignore:.*every stored pattern masked")
@pytest.mark.parametrize("options", [{}, {"adaptive_eta": True}, {"attention": "graph"}, {"logit_eta": 0.2}])
@pytest.mark.parametrize("steps", STEPS)
def test_nothing_to_recall_and_nothing_that_recalls_pass(steps, options):
    layer = layer_of(steps=steps, **options)
    data = bags(2)
    assert layer(data[:0]).shape == (0, 6, 8)
    assert layer(data[:, :0]).shape == (2, 0, 8)
    assert layer((data, data[:, :0], data)).shape == (2, 0, 8)
    nothing = layer((data[:, :0], data, data[:, :0]))
    assert_close(nothing, layer.output_projection.bias.expand(2, 6, 8))


@pytest.mark.parametrize("sparse", [False, True])
def test_padding_has_no_edge_in_a_graph_of_ones_own(sparse):
    layer = layer_of(steps=None, lam=0.7, eta=0.5)
    data = bags(2)
    weight = torch.rand(6, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    weight = weight + weight.T
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    alone = layer(data[1:, :4], stored_graph=weight[:4, :4])[0]
    graph = Graph.from_adjacency(weight)
    for given in (weight, graph.to_sparse() if sparse else graph, weight.expand(2, 6, 6)):
        assert_close(layer(data, mask, stored_graph=given)[1, :4], alone, rtol=1e-8, atol=1e-10)


def test_pooling_and_lookup_show_the_association_over_a_graph_of_ones_own():
    data, weight = bags(), torch.ones(6, 6, dtype=torch.bool)
    pool = layer_of(DiffusionPooling, quantity=3)
    given = {"stored_graph": weight, "state_graph": weight[:3, :3]}
    shown = pool.get_association_matrix(data, **given)
    pool(data, **given)
    assert_close(shown, pool.association_matrix)
    assert not torch.allclose(shown, pool.get_association_matrix(data))
    lookup = layer_of(DiffusionLayer, quantity=5)
    mask = torch.tensor([False] * 4 + [True] * 2).expand(4, -1)
    given = {"state_pattern_padding_mask": mask, "state_graph": weight}
    shown = lookup.get_association_matrix(data, **given)
    lookup(data, **given)
    assert_close(shown, lookup.association_matrix)
    assert_close(shown[:, :, :4], lookup.get_association_matrix(data[:, :4], state_graph=weight[:4, :4]))


def test_learned_strengths_can_be_shown_without_data():
    assert "lam=..., learned" in repr(layer_of(learn_lam=True).to("meta"))


@pytest.mark.parametrize("sparse", [False, True])
def test_padding_has_no_edge_in_given_graphs_which_may_be_one_a_sample(sparse):
    query, stored = sample(batch=(2,))
    graphs = [KNN(3, sparse=sparse)(part) for part in (query, stored)]
    of_query, of_stored = torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    of_query[1, 4:], of_stored[1, 7:] = True, True
    options = {"eta": 0.5, "beta": 2.0, "stop": TIGHT}
    given = {"query_graph": graphs[0], "pattern_graph": graphs[1]}
    found = retrieve_on_graph(query, stored, query_mask=of_query, mask=of_stored, **given, **options)
    cut = [
        Graph.from_adjacency(graph.to_dense().weight[1, :n, :n])
        for graph, n in zip(graphs, (4, 7), strict=True)
    ]
    alone = retrieve_on_graph(
        query[1, :4], stored[1, :7], query_graph=cut[0], pattern_graph=cut[1], **options
    )
    assert_close(found.value[1, :4], alone.value, rtol=1e-8, atol=1e-10)
    # One set of patterns for all, and a graph of them for each.
    shared = retrieve_on_graph(query, stored[0], **given, query_mask=of_query[1], **options)
    again = retrieve_on_graph(
        query, stored[:1].expand(2, -1, -1), **given, query_mask=of_query[1:].expand(2, -1), **options
    )
    assert_close(shared.value, again.value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [2, None])
def test_no_queries_recall_nothing(steps):
    query, stored = sample()
    none = retrieve_on_graph(query[None, :0], stored, eta=0.2, logit_eta=0.1, steps=steps)
    assert none.value.shape == (1, 0, 5)


@pytest.mark.parametrize("sparse", [False, True])
def test_isolated_nodes_lose_their_edges_and_others_keep_theirs(sparse):
    graph = KNN(3, sparse=sparse)(bags(2))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1] = mask[1, 4:] = True
    expected = graph.to_dense().weight.clone()
    expected[0, 1] = expected[0, :, 1] = 0
    expected[1, 4:] = expected[1, :, 4:] = 0
    found = graph.isolate(mask)
    assert found.is_sparse == sparse
    assert_close(found.to_dense().weight, expected)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        parts = out if isinstance(out, (tuple, list)) else [out]
        if (
            function is not torch.ops.aten.empty.memory_format
        ):  # of the allocator, whose pages are never touched
            self.count = max(
                [self.count, *(part.numel() for part in parts if isinstance(part, torch.Tensor))]
            )
        return out


def test_no_tensor_of_a_sparse_solve_grows_with_the_square_of_the_nodes(monkeypatch):
    block, width, neighbors = 2**14, 8, 4
    monkeypatch.setattr(function, "BLOCK", block)
    monkeypatch.setattr(neighbor_search, "BLOCK", block)
    count = 1000
    query, stored = torch.randn(count, width), torch.randn(count, width)
    graph = KNN(neighbors, sparse=True)
    with Largest() as largest:
        retrieve_on_graph(
            query, stored, beta=2.0, lam=2.0, eta=0.3, graph=graph, stop=Termination(max_steps=5)
        )
    # Blocks of scores, rounded up to whole rows, or both directions of every edge with a row each.
    assert largest.count <= max(block + count, 2 * neighbors * count * width)
    assert largest.count < count**2 / 10
