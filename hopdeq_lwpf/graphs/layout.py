"""Checks and batch shapes of graphs, Laplacians and operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hopdeq_lwpf._types import check_float_tensor, plain

# Units of rounding by which the two weights of one edge may differ.
ROUNDINGS = 8


def check_mask(mask: Tensor, batch: tuple[int, ...], nodes: int) -> None:
    """Raise unless it is bool and has one entry a node."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = ignore the node), got {kind}")
    if mask.shape != (*batch, nodes):
        raise ValueError(
            f"mask must have one entry a node, shape {(*batch, nodes)}, got {tuple(mask.shape)}; use mask.expand()"
        )


def check_input(x: Tensor, batch: tuple[int, ...], nodes: int) -> None:
    """Raise unless x is a floating-point (*batch, N, c)."""
    check_float_tensor("x", x)
    if x.ndim != len(batch) + 2 or x.shape[:-1] != (*batch, nodes):
        raise ValueError(
            f"x must be (*batch, N, c) with batch {batch} and N {nodes} of the graph, got shape {tuple(x.shape)}; "
            "fit the graph with .expand(batch) or .reshape(batch)"
        )


def check_weights(weight: Tensor) -> None:
    """Raise unless a dense adjacency is finite, >= 0 and symmetric."""
    weight = plain(weight.detach())
    check_values(weight)
    apart = (weight - weight.mT).abs()
    scale = weight.amax((-1, -2), keepdim=True) if weight.numel() else weight
    wrong = apart > ROUNDINGS * torch.finfo(weight.dtype).eps * scale
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"weight must be symmetric: entry {place} and its transpose differ by {float(apart[tuple(place)]):.3g}; "
            "use (weight + weight.mT) / 2, or torch.maximum(weight, weight.mT)"
        )


def check_values(weight: Tensor) -> None:
    """Raise unless all weights are finite and >= 0."""
    weight = plain(weight.detach())
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"weight must be finite; entry {(~weight.isfinite()).nonzero()[0].tolist()} is "
            f"{float(weight[~weight.isfinite()][0])}"
        )
    if bool((weight < 0).any()):
        raise ValueError(
            f"weight must be >= 0; entry {(weight < 0).nonzero()[0].tolist()} is "
            f"{float(weight[weight < 0][0]):.3g}; use weight.clamp(min=0)"
        )


def check_edges(edge: Tensor, nodes: int) -> None:
    """Raise unless it is an integer (2, E) of nodes that there are, none named twice in one direction."""
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 0:
        raise ValueError(f"nodes must be a whole number of at least 0, got {nodes!r}")
    if not isinstance(edge, Tensor) or edge.dtype not in (torch.int64, torch.int32, torch.int16):
        kind = edge.dtype if isinstance(edge, Tensor) else type(edge).__name__
        raise TypeError(f"edge must be an int64 tensor of numbers of nodes, got {kind}")
    if edge.ndim != 2 or edge.shape[0] != 2:
        raise ValueError(f"edge must be (2, E), the two ends of each edge, got shape {tuple(edge.shape)}")
    outside = (edge < 0) | (edge >= nodes)
    if bool(outside.any()):
        raise ValueError(
            f"edge must hold numbers from 0 to nodes - 1 = {nodes - 1}, got {int(edge[outside][0])}"
        )
    key, count = (edge[0].to(torch.int64) * nodes + edge[1]).unique(return_counts=True)
    if bool((count > 1).any()):
        first = int(key[count > 1][0])
        raise ValueError(
            f"edge names {[first // nodes, first % nodes]} twice; give each edge once, or once in each direction"
        )


def broadcast_samples(batch: tuple[int, ...], target: tuple[int, ...], device: torch.device) -> Tensor:
    """Which sample of `batch` each of the broadcast batch is: flat int64."""
    count = math.prod(batch)
    return torch.arange(count, device=device).view(batch).expand(target).reshape(-1)


def reshaped(batch: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...]:
    """The target with -1 filled in; raises where the sizes do not fit."""
    return tuple(torch.empty(batch, device="meta").reshape(target).shape)


def check_flat(batch: tuple[int, ...]) -> None:
    """Raise unless the batch has one dimension."""
    if len(batch) != 1:
        raise ValueError(f"select needs a batch of one dimension, got {batch}; use .reshape((-1,)) first")
