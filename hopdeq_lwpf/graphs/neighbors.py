"""Graphs from features: each node with those that are most similar to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hopdeq_lwpf import _checks
from hopdeq_lwpf._types import check_float_tensor, wide
from hopdeq_lwpf.graphs.graph import Graph
from hopdeq_lwpf.graphs.layout import check_mask
from hopdeq_lwpf.graphs.sparse import dots, full_precision, row_offsets, widest

SIMILARITIES = ("cosine", "rbf")
SYMMETRIZE = ("max", "mean")
# Nodes from which on sparse="auto" is sparse: with 8 neighbours and 64 columns, graph, (I + L)^-1 and one application
# of it took 11.6 ms dense and 5.7 ms sparse with gradients for 512 nodes, 3.6 and 3.5 for 256. Further applications
# alone, .25 and .53 ms at 512, are quicker sparse from 1,024 on.
SPARSE_FROM = 512
# Similarities that are compared at once where the graph is sparse: 16 MiB of float32.
BLOCK = 2**22
# Rounding of a squared distance in float64, in units of |x|^2.
FLOOR = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class KNN:
    """Joins each node to its most similar others: `knn(features, mask)`.

    neighbors: how many, at least 1; None: every other node. Those as similar as the last of them, to rounding, are
        neighbours too, so that the graph depends neither on the order of nodes nor on the rest of the batch.
        Equal rows are therefore all joined to each other, and count in the memory of a sparse graph.
    similarity: "cosine": max(cos, 0), a zero vector being similar to nothing; "rbf": exp(-|x - y|^2 / (2 bandwidth^2)).
        Only similarities above 0 (cosines: above their rounding) make an edge, with the similarity as its weight.
    bandwidth: of "rbf", above 0; None: for each sample the median over its nodes of the distance to the last
        neighbour (the lower median of an even number), without gradient.
    symmetrize: an edge where one of two nodes chose the other has its whole weight ("max") or half of it ("mean").
    sparse: whether the graph is a list of edges, for which nothing of size N x N is made. "auto": from 512 nodes on,
        where there are neighbours to count; from there sparse graphs with their operators and gradients are quicker.
        Under torch.func take False: the number of edges depends on the features.
    detach: True cuts the gradient from the weights to the features. The choice of neighbours never has one.
    """

    neighbors: int | None = 5
    similarity: Literal["cosine", "rbf"] = "cosine"
    bandwidth: float | None = None
    symmetrize: Literal["max", "mean"] = "max"
    sparse: bool | Literal["auto"] = "auto"
    detach: bool = False

    def __post_init__(self) -> None:
        if self.neighbors is not None:
            _checks.whole("neighbors", self.neighbors, least=1)
        _checks.choice("similarity", self.similarity, SIMILARITIES)
        _checks.choice("symmetrize", self.symmetrize, SYMMETRIZE)
        if not isinstance(self.detach, bool):
            raise _checks.SpecError(f"detach must be True or False, got {self.detach!r}")
        if self.sparse != "auto" and not isinstance(self.sparse, bool):
            raise _checks.SpecError(f"sparse must be 'auto', True or False, got {self.sparse!r}")
        if self.bandwidth is not None:
            _checks.number("bandwidth", self.bandwidth, above=0)
            if self.similarity != "rbf":
                raise _checks.SpecError("bandwidth belongs to similarity='rbf'; cosines have none")
        elif self.similarity == "rbf" and self.neighbors is None:
            raise _checks.SpecError(
                "bandwidth=None is the distance to the last neighbour: give bandwidth or neighbors"
            )
        if self.sparse is True and self.neighbors is None:
            raise _checks.SpecError("sparse=True needs neighbors: a graph of every pair is not sparse")

    def __call__(self, features: Tensor, mask: Tensor | None = None) -> Graph:
        """The graph of features (*batch, N, d); mask: (*batch, N) bool, True = isolate the node, which may hold NaN.

        The weights are float32 or wider. A node that is
        not finite, and not masked, makes all weights of its sample NaN.
        """
        check_float_tensor("features", features)
        if features.ndim < 2:
            raise ValueError(f"features must be (*batch, N, d), got shape {tuple(features.shape)}")
        *shape, nodes, width = features.shape
        batch = tuple(shape)
        if mask is not None:
            check_mask(mask, batch, nodes)
        points = wide(features.detach() if self.detach else features)
        points = points.reshape(math.prod(batch), nodes, width)
        hidden = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
        if mask is not None:
            hidden = mask.reshape(points.shape[:2])
        with full_precision(points):
            graph = self._graph(points, hidden)
        return graph.reshape(batch)

    def _graph(self, points: Tensor, hidden: Tensor) -> Graph:
        samples, nodes, width = points.shape
        points = points.masked_fill(hidden.unsqueeze(-1), 0.0)
        broken = ~points.detach().isfinite().all(-1)
        # 1, or NaN where a node is broken. Nothing that is compared may be NaN.
        faith = torch.where(broken.any(-1), math.nan, 1.0).to(points.dtype)
        points = points.masked_fill(broken.unsqueeze(-1), 0.0)
        points = _unit(points) if self.similarity == "cosine" else _centred(points, hidden)
        if self.sparse is True or (
            self.sparse == "auto" and self.neighbors is not None and nodes >= SPARSE_FROM
        ):
            return self._sparse(points, hidden, faith)
        return self._dense(points, hidden, faith)

    def _dense(self, points: Tensor, hidden: Tensor, faith: Tensor) -> Graph:
        close = self._closeness(points, points)
        close = (close + close.mT) / 2
        out = hidden.unsqueeze(-1) | hidden.unsqueeze(-2)
        out = out | torch.eye(points.shape[1], dtype=torch.bool, device=points.device)
        eps = torch.finfo(faith.dtype).eps
        with torch.no_grad():
            chosen, last = self._choose(close.masked_fill(out, -math.inf), points, eps)
            either = chosen | chosen.mT
        weight = self._similarity(close, self._variance(last)[:, None, None])
        weight = weight.masked_fill(~either, 0.0)
        if self.symmetrize == "mean":
            weight = (
                weight.masked_fill(chosen ^ chosen.mT, 0.0) + weight.masked_fill(chosen & chosen.mT, 0.0) / 2
            )
        weight = weight.to(faith.dtype) * faith[:, None, None]
        return Graph(weight, None, points.shape[1], (len(points),))

    def _sparse(self, points: Tensor, hidden: Tensor, faith: Tensor) -> Graph:
        samples, nodes, width = points.shape
        rows = samples * nodes
        with torch.no_grad():
            key, last = self._edges(points.detach(), hidden, torch.finfo(faith.dtype).eps)
            sample, column = key // nodes // nodes, key % nodes
            back = (sample * nodes + column) * nodes + key // nodes % nodes
            key, count = torch.cat([key, back]).unique(return_counts=True)
            row = key // nodes
            edge = torch.stack([row, row // nodes * nodes + key % nodes])
            offsets = row_offsets(row, rows)
        flat = points.reshape(rows, width)
        close = dots(flat, flat, edge, offsets)
        if self.similarity == "rbf":
            square = flat.square().sum(-1)
            close = _negative_distance(square[edge[0]] + square[edge[1]], close)
        weight = self._similarity(close, self._variance(last)[edge[0] // max(nodes, 1)])
        if self.symmetrize == "mean":
            weight = weight * count / 2
        weight = weight.to(faith.dtype)
        some = (weight.detach() > 0).nonzero().squeeze(-1)
        weight = weight[some] * faith[edge[0, some] // max(nodes, 1)]
        return Graph(weight, edge[:, some], nodes, (samples,))

    def _edges(self, points: Tensor, hidden: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The choices as row * N + column, rows of all samples numbered through; and how close the last of each is."""
        samples, nodes, _ = points.shape
        together = max(1, BLOCK // max(1, nodes * nodes))
        step = max(1, BLOCK // max(1, together * nodes))
        index = torch.arange(nodes, device=points.device)
        keys, lasts = [index[:0]], []
        for first in range(0, samples, together):
            some = slice(first, first + together)
            parts = []
            for begin in range(0, nodes, step):
                rows = slice(begin, begin + step)
                close = self._closeness(points[some, rows], points[some])
                out = hidden[some, rows].unsqueeze(-1) | hidden[some].unsqueeze(-2)
                out |= index[rows].unsqueeze(-1) == index
                chosen, last = self._choose(close.masked_fill_(out, -math.inf), points[some, rows], eps)
                sample, row, column = chosen.nonzero(as_tuple=True)
                keys.append(((first + sample) * nodes + begin + row) * nodes + column)
                parts.append(last)
            lasts.append(torch.cat(parts, 1) if parts else points.new_zeros(len(points[some]), 0))
        return torch.cat(keys), torch.cat(lasts) if lasts else points.new_zeros(0, nodes)

    def _closeness(self, rows: Tensor, points: Tensor) -> Tensor:
        """What grows with the similarity of (P, R, d) and (P, N, d): the cosine, or the negative squared distance."""
        products = rows @ points.mT
        if self.similarity == "cosine":
            return products
        squares = rows.square().sum(-1).unsqueeze(-1) + points.square().sum(-1).unsqueeze(-2)
        return _negative_distance(squares, products)

    def _choose(self, close: Tensor, rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Which of (P, R, N) are neighbours, -inf being none; and how close the last neighbour of each row is.

        The rounding of a product of two unit vectors is a few eps times the root of their width; that of a squared
        distance, computed in float64, a few eps of the dtype times itself for features that come from a computation.
        """
        rounding = (8 + 2 * math.sqrt(rows.shape[-1])) * eps
        possible = close > (rounding if self.similarity == "cosine" else -math.inf)
        count = min(self.neighbors or 0, close.shape[-1] - 1)
        if count < 1 or not close.numel():
            return possible, close.new_full(close.shape[:-1], -math.inf)
        top = close.topk(count, -1).values
        last = top[..., -1:]
        slack: Tensor | float = rounding
        if self.similarity == "rbf":
            slack = rounding * last.abs() + FLOOR * rows.square().sum(-1, keepdim=True)
        chosen = possible & (close >= last - slack)
        return chosen, top.masked_fill(top == -math.inf, math.inf).amin(-1)

    def _variance(self, last: Tensor) -> Tensor:
        """The squared bandwidth of each sample: (P,)."""
        if self.bandwidth is not None:
            return last.new_full(last.shape[:1], self.bandwidth**2)
        if not last.shape[1]:
            return last.new_ones(last.shape[:1])
        # Nodes without a neighbour count for nothing; squares have the same median as distances.
        return last.neg().masked_fill(last.isinf(), math.nan).nanmedian(-1).values.nan_to_num(nan=1.0)

    def _similarity(self, close: Tensor, variance: Tensor) -> Tensor:
        if self.similarity == "cosine":
            return close.clamp_min(0)
        # Where most nodes coincide with their neighbours, only those that coincide are similar.
        none = variance == 0
        similar = (close / (2 * variance.masked_fill(none, 1.0))).exp()
        return torch.where(none, (close == 0).to(close.dtype), similar)


def _unit(points: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay, without gradient."""
    # Cosines do not depend on the scale; without it the squares of large entries leave the range.
    scale = points.detach().abs().amax(-1, keepdim=True) if points.shape[-1] else points.sum(-1, keepdim=True)
    nothing = scale == 0
    points = points / scale.masked_fill(nothing, 1.0)
    square = points.square().sum(-1, keepdim=True).masked_fill(nothing, 1.0)
    return (points * square.rsqrt()).masked_fill(nothing, 0.0)


def _centred(points: Tensor, hidden: Tensor) -> Tensor:
    """Points about their mean, in float64: a squared distance is a small difference of large squares."""
    points = points.to(widest(points.device))
    count = (~hidden).sum(-1).clamp_min(1)[:, None, None]
    mean = points.sum(-2, keepdim=True) / count
    return (points - mean).masked_fill(hidden.unsqueeze(-1), 0.0)


def _negative_distance(squares: Tensor, products: Tensor) -> Tensor:
    """-|x - y|^2 from |x|^2 + |y|^2 and x . y, 0 where it is not above rounding."""
    close = 2 * products - squares
    return close.masked_fill(close >= -FLOOR / 4 * squares.detach(), 0.0)
