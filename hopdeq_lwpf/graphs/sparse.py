"""Sparse matrices of a symmetric pattern and their product with a dense one, with gradients of every order.

torch's own sparse product makes a dense N x N matrix in its backward pass. `embedding_bag` is the fastest forward
product here: 2,000 nodes of 13.5 edges take .03 ms at 64 columns (CSR .08, gather and index_add .6) and .3 ms at
512 (.65, 31), in float32 with two threads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Entries of one gathered block, half a MiB of float32: two of them stay in a core's cache.
BLOCK = 2**17


class SparseMatrix(NamedTuple):
    """A matrix with the entries `weight` (E,) at `edge` (2, E); `offsets` (M + 1,) is where each row begins.

    The places are sorted by row and column, and the transposed place of each is there too. The rows of all samples
    of a batch are numbered through, so that a batch is one block-diagonal matrix.
    """

    weight: Tensor
    edge: Tensor
    offsets: Tensor

    def times(self, x: Tensor) -> Tensor:
        """The product with x (M, c). Gradients take the matrix to be symmetric."""
        return product(self.weight.to(x.dtype), x, self.edge, self.offsets)

    def to_dense(self, samples: int, nodes: int) -> Tensor:
        """(samples, nodes, nodes)."""
        row, column = self.edge
        dense = self.weight.new_zeros(samples * nodes * nodes)
        return dense.index_add(0, row * nodes + column % max(nodes, 1), self.weight).view(
            samples, nodes, nodes
        )

    def pick(self, samples: Tensor, nodes: int) -> SparseMatrix:
        """The blocks of these samples (P,) in their order, each as often as it is named."""
        place, shift = pick_edges(self.offsets, samples, nodes)
        edge = self.edge[:, place] + shift
        return SparseMatrix(self.weight[place], edge, row_offsets(edge[0], len(samples) * nodes))


def row_offsets(row: Tensor, rows: int) -> Tensor:
    """Where each row begins, and where the last ends, from the sorted rows of the entries: (M + 1,)."""
    return torch.searchsorted(row.contiguous(), torch.arange(rows + 1, device=row.device))


def pick_edges(offsets: Tensor, samples: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Which edges belong to these samples, and what to add to their numbers of nodes."""
    first = offsets[samples * nodes]
    count = offsets[(samples + 1) * nodes] - first
    begin = count.cumsum(0) - count
    order = torch.arange(len(samples), device=samples.device)
    place = torch.arange(int(count.sum()), device=samples.device)
    place = place + (first - begin).repeat_interleave(count)
    return place, ((order - samples) * nodes).repeat_interleave(count)


def with_diagonal(weight: Tensor, diagonal: Tensor, edge: Tensor) -> SparseMatrix:
    """The matrix of these off-diagonal entries and this diagonal (M,)."""
    rows = len(diagonal)
    nodes = torch.arange(rows, device=edge.device)
    order = torch.cat([edge[0] * rows + edge[1], nodes * (rows + 1)]).argsort()
    edge = torch.cat([edge, nodes.expand(2, -1)], 1)[:, order]
    return SparseMatrix(torch.cat([weight, diagonal])[order], edge, row_offsets(edge[0], rows))


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Outside of autocast: what is solved or exponentiated must not be rounded to bfloat16 half-way."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def widest(device: torch.device) -> torch.dtype:
    """float64, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def bag(weight: Tensor, x: Tensor, column: Tensor, offsets: Tensor) -> Tensor:
    """The plain product, without gradient."""
    if not x.numel() or not len(column):
        return torch.zeros_like(x)
    return functional.embedding_bag(
        column, x, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def product(weight: Tensor, x: Tensor, edge: Tensor, offsets: Tensor, symmetric: bool = True) -> Tensor:
    """y[i] = sum over the entries (i, j) of weight * x[j]; x (M, c)."""
    return _Product.apply(weight, x.contiguous(), edge, offsets, symmetric)


def dots(left: Tensor, right: Tensor, edge: Tensor, offsets: Tensor) -> Tensor:
    """left[i] . right[j] for each entry (i, j); left and right (M, c)."""
    return _Dots.apply(left, right, edge, offsets)


def _transposed(weight: Tensor, edge: Tensor) -> Tensor:
    """The weights at the transposed places."""
    return weight[edge[1].argsort(stable=True)]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, x: Tensor, edge: Tensor, offsets: Tensor, symmetric: bool) -> Tensor:
        return bag(weight, x, edge[1], offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, x, edge, offsets, ctx.symmetric = inputs
        ctx.save_for_backward(weight, x, edge, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, edge, offsets = ctx.saved_tensors
        to_weight = to_x = None
        if ctx.needs_input_grad[0]:
            to_weight = dots(grad, x, edge, offsets)
        if ctx.needs_input_grad[1]:
            back = weight if ctx.symmetric else _transposed(weight, edge)
            to_x = product(back, grad, edge, offsets, ctx.symmetric)
        return to_weight, to_x, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        weight, x, edge, offsets, symmetric = inputs
        if in_dims[0] is None and in_dims[1] is not None:  # more columns
            x = x.movedim(in_dims[1], 0)
            y = product(weight, x.transpose(0, 1).flatten(1), edge, offsets, symmetric)
            return y.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1), 0
        return _one_by_one(info, in_dims, _Product, inputs)


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(left: Tensor, right: Tensor, edge: Tensor, offsets: Tensor) -> Tensor:
        row, column = edge
        step = max(1, BLOCK // max(1, left.shape[-1]))
        blocks = [
            (left[i] * right[j]).sum(-1) for i, j in zip(row.split(step), column.split(step), strict=True)
        ]
        return torch.cat(blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, edge, offsets = ctx.saved_tensors
        to_left = to_right = None
        if ctx.needs_input_grad[0]:
            to_left = product(grad, right, edge, offsets, False)
        if ctx.needs_input_grad[1]:
            to_right = product(_transposed(grad, edge), left, edge, offsets, False)
        return to_left, to_right, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return _one_by_one(info, in_dims, _Dots, inputs)


def _one_by_one(info: Any, in_dims: tuple[int | None, ...], function: Any, inputs: Any) -> tuple[Tensor, int]:
    """A loop over what is vmapped; the pattern itself is the same for all."""
    calls = [
        [value if dim is None else value.select(dim, k) for value, dim in zip(inputs, in_dims, strict=True)]
        for k in range(info.batch_size)
    ]
    return torch.stack([function.apply(*call) for call in calls]), 0
