"""Hierarchical networks for the tests: graphs, weights that matter, contexts with random inputs."""

import torch

from hopdeq_lwpf import Termination
from hopdeq_lwpf.models.layer_graph import LayerGraph, make_neurons

F64 = torch.float64
TIGHT = Termination(rtol=1e-13, atol=1e-15, max_steps=5000)
# Three layers to seven, with skips between even and odd layers, one of them from the input.
GRAPHS = {
    "3 layers": ([4, 6, 3], ()),
    "4 layers": ([4, 5, 6, 3], ()),
    "4 layers, skip": ([4, 5, 6, 3], [(0, 3)]),
    "5 layers, skips": ([4, 5, 3, 4, 2], [(1, 4), (0, 3)]),
    "7 layers": ([4, 5, 3, 4, 3, 4, 2], ()),
}
SAME_PARITY = ([4, 5, 3, 4, 2], [(1, 3), (0, 2)])


def function(kind, graph, *, lagrangian="sigmoid", forgetting=None, scale=1.0, seed=0, **options):
    """In float64, with biases that matter."""
    torch.manual_seed(seed)
    layers = LayerGraph.of(*graph)
    f = kind(layers, make_neurons(layers, lagrangian, forgetting, "sigmoid"), **options).double()
    with torch.no_grad():
        for weight in f.weights.values():
            weight.mul_(scale)
        for bias in f.biases.values():
            bias.normal_(std=0.3)
    return f


def problem(f, batch=3, seed=5):
    """The context of random inputs, and random states."""
    generator = torch.Generator().manual_seed(seed)
    x = f.prepare(torch.randn(batch, f.graph.widths[0], dtype=F64, generator=generator))
    return x, torch.randn(x.start.shape, dtype=F64, generator=generator)


def network(kind, layers=(5, 6, 4, 3), *, scale=1.0, **options):
    """In float64; weights smaller by `scale` make maps that contract faster."""
    torch.manual_seed(1)
    layer = kind(layers, **{"stop": TIGHT, **options}).double()
    with torch.no_grad():
        for weight in layer.f.weights.values():
            weight.mul_(scale)
    return layer


def inputs(batch=3, width=5, seed=2):
    return torch.rand(batch, width, dtype=F64, generator=torch.Generator().manual_seed(seed))
