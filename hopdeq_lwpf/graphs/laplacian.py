"""Graph Laplacians: symmetric, positive semi-definite, one a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown, wide
from hopdeq_lwpf.graphs.layout import broadcast_samples, check_flat, check_input, reshaped
from hopdeq_lwpf.graphs.sparse import SparseMatrix, full_precision, with_diagonal

LAPLACIANS = ("normalized", "combinatorial")
# The bound of the combinatorial Laplacian is a sum of at most N weights and is met by bipartite graphs whose nodes all
# have the same degree: raised by this many units of rounding it is never below.
ROUNDINGS = 16


class Laplacian(NamedTuple):
    """L, in float32 or wider; `Graph.laplacian` makes one.

    matrix: dense (*batch, N, N), or the sparse matrix of all samples. bound: (*batch,), no eigenvalue lies above
    (and none below 0), without gradient: 2 for the normalized Laplacian; for the combinatorial one
    max over i of d_i + m_i, m_i the weighted mean degree of the neighbours of i (Merris 1998).

    Why: |x^T L x| <= |x|^T Q |x| with Q = D + W, so that the largest eigenvalue of L is at most that of Q. Q has
    the eigenvalues of D^-1 Q D, whose row i sums to d_i + sum_j w_ij d_j / d_i = d_i + m_i, and no eigenvalue is
    above the largest row sum of a matrix without negative entries. (For the normalized Laplacian, Q becomes
    I + D^-1/2 W D^-1/2, similar to I + D^-1 W with row sums of 2.)
    """

    matrix: Tensor | SparseMatrix
    nodes: int
    batch: tuple[int, ...]
    bound: Tensor

    @property
    def is_sparse(self) -> bool:
        """Whether the matrix is a list of entries."""
        return isinstance(self.matrix, SparseMatrix)

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.bound.dtype

    def times(self, x: Tensor) -> Tensor:
        """L x for x (*batch, N, c), in the dtype of x."""
        check_input(x, self.batch, self.nodes)
        return times(self.matrix, x)

    def quadratic(self, x: Tensor) -> Tensor:
        """tr(x^T L x), half the weighted sum of squared differences along edges: (*batch,), float32 or wider."""
        wider = x.to(torch.promote_types(self.dtype, wide(x).dtype))
        return (wider * self.times(wider)).sum((-1, -2))

    def to_dense(self) -> Tensor:
        """(*batch, N, N)."""
        return to_dense(self.matrix, self.batch, self.nodes)

    def expand(self, batch: Sequence[int]) -> Laplacian:
        """The Laplacian with exactly this batch shape, to which its own broadcasts."""
        batch = tuple(batch)
        matrix = expand(self.matrix, self.batch, batch, self.nodes)
        return Laplacian(matrix, self.nodes, batch, self.bound.expand(batch))

    def reshape(self, batch: Sequence[int]) -> Laplacian:
        """The same Laplacians in another batch shape; one dimension may be -1."""
        batch = reshaped(self.batch, tuple(batch))
        return Laplacian(reshape(self.matrix, batch), self.nodes, batch, self.bound.reshape(batch))

    def select(self, rows: Tensor) -> Laplacian:
        """Those at `rows` (R,) int64 of a batch of one dimension: (P,) to (R,)."""
        check_flat(self.batch)
        matrix = select(self.matrix, rows, self.nodes)
        return Laplacian(matrix, self.nodes, (len(rows),), self.bound.index_select(0, rows))


def make_laplacian(
    weight: Tensor, edge: Tensor | None, nodes: int, batch: tuple[int, ...], kind: str
) -> Laplacian:
    """See `Graph.laplacian`."""
    if kind not in LAPLACIANS:
        raise unknown("Laplacian", kind, LAPLACIANS)
    weight = wide(weight)
    rows = math.prod(batch) * nodes
    degree = weight.sum(-1) if edge is None else weight.new_zeros(rows).index_add(0, edge[0], weight)
    isolated = degree == 0
    diagonal = degree
    if kind == "normalized":
        # Not 0^-1/2 = inf, whose gradient would be NaN.
        root = degree.masked_fill(isolated, 1.0).rsqrt()
        if edge is None:
            weight = weight * root.unsqueeze(-1) * root.unsqueeze(-2)
        else:
            weight = weight * root[edge[0]] * root[edge[1]]
        # degree * 0 + 1 keeps a NaN.
        diagonal = (degree.detach() * 0 + 1).masked_fill(isolated, 0.0)
        bound = weight.new_full(batch, 2.0)
    matrix = torch.diag_embed(diagonal) - weight if edge is None else with_diagonal(-weight, diagonal, edge)
    if kind == "combinatorial":
        bound = _bound(matrix, diagonal, nodes, batch)
    return Laplacian(matrix, nodes, batch, bound)


def _bound(matrix: Tensor | SparseMatrix, degree: Tensor, nodes: int, batch: tuple[int, ...]) -> Tensor:
    """max over i of d_i + m_i; the neighbours' degrees are D d - L d."""
    with torch.no_grad():
        if not nodes:
            return degree.new_zeros(batch)
        degree = degree.detach().view(*batch, nodes)
        among = degree.square() - times(matrix, degree.unsqueeze(-1)).squeeze(-1)
        isolated = degree == 0
        mean = (among / degree.masked_fill(isolated, 1.0)).masked_fill(isolated, 0.0)
        bound = (degree + mean).amax(-1)
        return bound * (1 + ROUNDINGS * torch.finfo(bound.dtype).eps)


def times(matrix: Tensor | SparseMatrix, x: Tensor) -> Tensor:
    """The product with x (*batch, N, c), computed in the wider dtype of both, returned in that of x."""
    weight = matrix.weight if isinstance(matrix, SparseMatrix) else matrix
    with full_precision(x):
        wider = x.to(torch.promote_types(weight.dtype, wide(x).dtype))
        if isinstance(matrix, SparseMatrix):
            y = matrix.times(wider.flatten(0, -2)).view(x.shape)
        else:
            y = matrix.to(wider.dtype) @ wider
    return y.to(x.dtype)


def to_dense(matrix: Tensor | SparseMatrix, batch: tuple[int, ...], nodes: int) -> Tensor:
    """(*batch, N, N)."""
    if isinstance(matrix, SparseMatrix):
        return matrix.to_dense(math.prod(batch), nodes).view(*batch, nodes, nodes)
    return matrix


def expand(
    matrix: Tensor | SparseMatrix, batch: tuple[int, ...], target: tuple[int, ...], nodes: int
) -> Tensor | SparseMatrix:
    """The matrices broadcast to another batch shape."""
    if not isinstance(matrix, SparseMatrix):
        return matrix.expand(*target, nodes, nodes)
    if batch == target:
        return matrix
    return matrix.pick(broadcast_samples(batch, target, matrix.edge.device), nodes)


def reshape(matrix: Tensor | SparseMatrix, batch: tuple[int, ...]) -> Tensor | SparseMatrix:
    """The matrices in another batch shape; the sparse form has none."""
    return matrix if isinstance(matrix, SparseMatrix) else matrix.reshape(*batch, *matrix.shape[-2:])


def select(matrix: Tensor | SparseMatrix, rows: Tensor, nodes: int) -> Tensor | SparseMatrix:
    """The matrices of these samples of a flat batch."""
    return matrix.pick(rows, nodes) if isinstance(matrix, SparseMatrix) else matrix.index_select(0, rows)
