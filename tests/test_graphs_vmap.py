"""torch.func.vmap over what a sparse diffusion is made from, against a loop."""

import pytest
import torch
from problems import normal
from torch.testing import assert_close

from hopdeq_lwpf.graphs import KNN, heat_kernel, implicit_euler

NODES, WIDTH = 6, 3


@pytest.mark.parametrize("kind", [implicit_euler, heat_kernel])
def test_vmap_over_times_is_a_loop_over_times(kind):
    laplacian = KNN(neighbors=2, sparse=True)(normal(1, NODES, WIDTH)).laplacian()
    x, slopes = normal(1, NODES, WIDTH, seed=2), normal(4, 1, NODES, WIDTH, seed=3)

    def pulled(slope):
        """A product with the transpose of the Jacobian, as jacobians by vmap make them."""
        eta = torch.tensor([0.7], dtype=x.dtype, requires_grad=True)
        out, pull = torch.func.vjp(lambda eta, x: kind(laplacian, eta)(x), eta.detach(), x)
        return pull(slope)

    every = torch.func.vmap(pulled)(slopes)
    for i, slope in enumerate(slopes):
        for part, one in zip(every, pulled(slope), strict=True):
            assert_close(part[i], one, rtol=1e-10, atol=1e-12)


def test_a_dense_graph_is_its_own_dense_form():
    graph = KNN(neighbors=2, sparse=False)(normal(2, NODES, WIDTH))
    assert graph.to_dense() is graph
    sparse = graph.to_sparse()
    assert sparse.to_sparse() is sparse
    assert sparse.laplacian().is_sparse
    assert not graph.laplacian().is_sparse
    assert_close(sparse.to_dense().weight, graph.weight)
