"""Undirected weighted graphs, one a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf._types import check_float_tensor, plain, wide
from hopdeq_lwpf.graphs.laplacian import Laplacian, make_laplacian
from hopdeq_lwpf.graphs.layout import (
    ROUNDINGS,
    broadcast_samples,
    check_edges,
    check_flat,
    check_input,
    check_mask,
    check_values,
    check_weights,
    reshaped,
)
from hopdeq_lwpf.graphs.sparse import SparseMatrix, full_precision, pick_edges, row_offsets


class Graph(NamedTuple):
    """Symmetric weights >= 0 without loops; a node with no edge is isolated.

    weight: dense (*batch, N, N), or sparse (E,) with both directions of each edge, sorted by row and column.
    edge: None (dense), or (2, E) int64: the nodes of each weight, numbered sample * N + node over the flattened
    batch. nodes: N. batch: the batch shape.
    """

    weight: Tensor
    edge: Tensor | None
    nodes: int
    batch: tuple[int, ...]

    @classmethod
    def from_adjacency(
        cls, weight: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Graph:
        """A dense graph from weights (*batch, N, N); the diagonal is ignored.

        mask: (*batch, N) bool, True = isolate the node, whose weights may be anything, NaN too. dtype: of the
        weights; None keeps that of `weight`, and makes bool (an edge or none: weight 1 or 0) float32.
        Raises TypeError or ValueError where the weights are not a float or bool tensor, square, finite, >= 0 and
        symmetric to 8 roundings of the largest.
        """
        if isinstance(weight, Tensor) and weight.dtype == torch.bool:
            weight = weight.to(dtype or torch.float32)
        check_float_tensor("weight", weight)
        if weight.ndim < 2 or weight.shape[-1] != weight.shape[-2]:
            raise ValueError(f"weight must be square (*batch, N, N), got shape {tuple(weight.shape)}")
        nodes = weight.shape[-1]
        drop = torch.eye(nodes, dtype=torch.bool, device=weight.device)
        if mask is not None:
            check_mask(mask, tuple(weight.shape[:-2]), nodes)
            drop = drop | mask.unsqueeze(-1) | mask.unsqueeze(-2)
        weight = weight.to(dtype or weight.dtype).masked_fill(drop, 0.0)
        check_weights(weight)
        return cls((weight + weight.mT) / 2, None, nodes, tuple(weight.shape[:-2]))

    @classmethod
    def from_edges(
        cls, edge: Tensor, nodes: int, weight: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Graph:
        """One sparse graph (batch ()) from the ends (2, E) of its edges, each given once or in both directions.

        weight: (E,) >= 0; None: 1. dtype: of the weights; None keeps that of `weight`, float32 without one.
        Loops are ignored. Raises TypeError or ValueError for numbers of nodes out of range, edges given twice, and
        directions of one edge whose weights differ by more than 8 roundings.
        """
        check_edges(edge, nodes)
        if weight is None:
            weight = torch.ones(edge.shape[1], dtype=dtype or torch.float32, device=edge.device)
        check_float_tensor("weight", weight)
        if weight.shape != edge.shape[1:]:
            raise ValueError(
                f"weight must have one entry an edge, {tuple(edge.shape[1:])}, got shape {tuple(weight.shape)}"
            )
        check_values(weight)
        keep = (edge[0] != edge[1]).nonzero().squeeze(-1)
        edge, weight = edge[:, keep].to(torch.int64), weight.to(dtype or weight.dtype)[keep]
        low, high = edge.amin(0), edge.amax(0)
        key, which, count = (low * nodes + high).unique(return_inverse=True, return_counts=True)
        mean = weight.new_zeros(len(key)).index_add(0, which, weight) / count
        apart = (weight - mean[which]).abs() > ROUNDINGS * torch.finfo(weight.dtype).eps * mean[which]
        if bool(plain(apart.detach()).any()):
            first = edge[:, int(apart.nonzero()[0])].tolist()
            raise ValueError(
                f"weight must be the same in both directions of an edge; those of {first} differ. Give each edge "
                "once, or one weight for both directions"
            )
        one, other = key // max(nodes, 1), key % max(nodes, 1)
        ends = torch.stack([torch.cat([one, other]), torch.cat([other, one])])
        order = (ends[0] * nodes + ends[1]).argsort()
        return cls(torch.cat([mean, mean])[order], ends[:, order], nodes, ())

    @property
    def is_sparse(self) -> bool:
        """Whether the graph is a list of edges."""
        return self.edge is not None

    @property
    def samples(self) -> int:
        """How many graphs there are."""
        return math.prod(self.batch)

    @property
    def degree(self) -> Tensor:
        """The sum of the weights of each node's edges: (*batch, N)."""
        if self.edge is None:
            return self.weight.sum(-1)
        total = self.weight.new_zeros(self.samples * self.nodes)
        return total.index_add(0, self.edge[0], self.weight).view(*self.batch, self.nodes)

    def times(self, x: Tensor) -> Tensor:
        """W x for x (*batch, N, c), in the dtype of x, computed in float32 or wider."""
        check_input(x, self.batch, self.nodes)
        with full_precision(x):
            wider = x.to(torch.promote_types(wide(self.weight).dtype, wide(x).dtype))
            if self.edge is None:
                return (self.weight.to(wider.dtype) @ wider).to(x.dtype)
            return self._matrix().times(wider.flatten(0, -2)).view(x.shape).to(x.dtype)

    def to_dense(self) -> Graph:
        """The same graph as a matrix a sample."""
        if self.edge is None:
            return self
        weight = self._matrix().to_dense(self.samples, self.nodes)
        return Graph(weight.view(*self.batch, self.nodes, self.nodes), None, self.nodes, self.batch)

    def to_sparse(self) -> Graph:
        """The same graph as a list of the edges whose weight is not 0."""
        if self.edge is not None:
            return self
        flat = self.weight.reshape(self.samples, self.nodes, self.nodes)
        sample, row, column = flat.nonzero(as_tuple=True)
        weight = flat[sample, row, column]
        start = sample * self.nodes
        return Graph(weight, torch.stack([start + row, start + column]), self.nodes, self.batch)

    def isolate(self, mask: Tensor) -> Graph:
        """The same graph without the edges of the nodes where mask (*batch, N), bool, is True."""
        check_mask(mask, self.batch, self.nodes)
        if self.edge is None:
            drop = mask.unsqueeze(-1) | mask.unsqueeze(-2)
            return self._replace(weight=self.weight.masked_fill(drop, 0.0))
        drop = mask.reshape(-1)[self.edge].any(0)
        keep = (~drop).nonzero().squeeze(-1)
        return self._replace(weight=self.weight[keep], edge=self.edge[:, keep])

    def connected(self) -> Tensor:
        """Which pairs of nodes have an edge: bool (*batch, N, N), dense."""
        return self.to_dense().weight > 0

    def expand(self, batch: Sequence[int]) -> Graph:
        """The graph with exactly this batch shape, to which its own broadcasts."""
        batch = tuple(batch)
        if self.edge is None:
            weight = self.weight.expand(*batch, self.nodes, self.nodes)
            return Graph(weight, None, self.nodes, batch)
        if batch == self.batch:
            return self
        return self._pick(broadcast_samples(self.batch, batch, self.edge.device), batch)

    def reshape(self, batch: Sequence[int]) -> Graph:
        """The same graphs in another batch shape; one dimension may be -1."""
        batch = reshaped(self.batch, tuple(batch))
        if self.edge is not None:
            return self._replace(batch=batch)
        return Graph(self.weight.reshape(*batch, self.nodes, self.nodes), None, self.nodes, batch)

    def unsqueeze(self, dim: int) -> Graph:
        """The same graphs with a batch dimension of size 1 at `dim`."""
        batch = list(self.batch)
        batch.insert(dim if dim >= 0 else dim + len(batch) + 1, 1)
        return self.reshape(batch)

    def select(self, rows: Tensor) -> Graph:
        """The graphs at `rows` (R,) int64 of a batch of one dimension: (P,) to (R,)."""
        check_flat(self.batch)
        if self.edge is not None:
            return self._pick(rows, (len(rows),))
        return Graph(self.weight.index_select(0, rows), None, self.nodes, (len(rows),))

    def laplacian(self, kind: str = "normalized") -> Laplacian:
        """ "normalized": D^-1/2 (D - W) D^-1/2, whose scale does not depend on the degrees; "combinatorial": D - W.

        A node of degree 0 has a row of zeros in both: it has nothing to mix with, so that diffusion leaves it as
        it is. Computed in float32 or wider.
        """
        return make_laplacian(self.weight, self.edge, self.nodes, self.batch, kind)

    def _matrix(self) -> SparseMatrix:
        assert self.edge is not None
        return SparseMatrix(self.weight, self.edge, row_offsets(self.edge[0], self.samples * self.nodes))

    def _pick(self, samples: Tensor, batch: tuple[int, ...]) -> Graph:
        weight, edge, offsets = self._matrix()
        place, shift = pick_edges(offsets, samples, self.nodes)
        return Graph(weight[place], edge[:, place] + shift, self.nodes, batch)
