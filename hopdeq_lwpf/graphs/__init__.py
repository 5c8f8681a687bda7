"""Undirected weighted graphs, one a sample: from features, their Laplacians, and diffusion along them.

`KNN` builds a `Graph` from features, `Graph.laplacian` its Laplacian L, and `heat_kernel`, `implicit_euler` and
`explicit_euler` diffusion for a time eta: exp(-eta L) and two approximations of it. Dense graphs are matrices,
sparse ones lists of edges; both are the same to rounding, with the same gradients.
"""

from hopdeq_lwpf.graphs.graph import Graph
from hopdeq_lwpf.graphs.laplacian import LAPLACIANS, Laplacian
from hopdeq_lwpf.graphs.neighbors import KNN
from hopdeq_lwpf.graphs.operators import (
    OPERATORS,
    Operator,
    diffusion_operator,
    explicit_euler,
    heat_kernel,
    implicit_euler,
)

__all__ = [
    "KNN",
    "LAPLACIANS",
    "OPERATORS",
    "Graph",
    "Laplacian",
    "Operator",
    "diffusion_operator",
    "explicit_euler",
    "heat_kernel",
    "implicit_euler",
]
