"""What a separation function is, and what all of them do alike: masks, dtypes, empty rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hopdeq_lwpf._types import wide


class Separation:
    """Base of the separation functions. Those without parameters may be shared by any number of models.

    A new one overrides `weights_of` and `lagrangian_of`, which see logits (*batch, N) with N >= 1 in float32
    or wider, masked entries -inf, and no row that is masked entirely; and `both_of` where the two share
    work, or `deferred_of` where the weights make the Lagrangian cheaper without giving it.
    A function with something to learn is an `nn.Module` too, as `Entmax` is, so that the model that holds it
    lists its parameters.

    `has_energy`: whether L, or an increasing function of it, is convex, symmetric and non-decreasing, with the
    weights as the gradient of L; the step that the similarity calls for then never raises the energy.
    `similarity`: what the scores s are made from. "dot": s = beta xi.z, E = |z|^2/2 - L/beta, step X^T p.
    "euclidean": s = -(beta/2) |z - xi|^2, E = -L/beta, step X^T p / sum p.
    """

    has_energy: bool = False
    similarity: str = "dot"

    def weights_of(self, logits: Tensor) -> Tensor:
        """p(s): (*batch, N) -> (*batch, N)."""
        raise NotImplementedError(f"{type(self).__name__} must override weights_of(logits)")

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """L(s): (*batch, N) -> (*batch)."""
        raise NotImplementedError(f"{type(self).__name__} must override lagrangian_of(logits)")

    def both_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """p(s) and L(s)."""
        return self.weights_of(logits), self.lagrangian_of(logits)

    def deferred_of(self, logits: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """p(s), and a function that makes L(s)."""
        weights, lagrangian = self.both_of(logits)
        return weights, lambda: lagrangian

    def weights(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """p(s), in the dtype of the scores: (*batch, N) -> (*batch, N).

        mask: bool, broadcastable to the scores, True = removed: weight exactly 0, and no part in the
        denominator. A row that is masked entirely gets weights 0. Raises TypeError for a mask of another
        dtype.
        """
        if not scores.shape[-1]:
            return scores
        logits, nothing_left = _logits(scores, mask)
        return _clear(self.weights_of(logits), nothing_left).to(scores.dtype)

    def lagrangian(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """L(s), in float32 or wider, since energies differ by little: (*batch, N) -> (*batch).

        Masked as `weights`; a row that is masked entirely gets 0.
        """
        if not scores.shape[-1]:
            return wide(scores).sum(-1)
        logits, nothing_left = _logits(scores, mask)
        return _clear(self.lagrangian_of(logits), nothing_left, -1)

    def weights_and_lagrangian(self, scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`weights` and `lagrangian` for little more than the price of the first."""
        weights, lagrangian = self.weights_then_lagrangian(scores, mask)
        return weights, lagrangian()

    def weights_then_lagrangian(
        self, scores: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """`weights`, and a function that makes `lagrangian` from them for little."""
        if not scores.shape[-1]:
            return scores, lambda: wide(scores).sum(-1)
        logits, nothing_left = _logits(scores, mask)
        weights, lagrangian = self.deferred_of(logits)
        return _clear(weights, nothing_left).to(scores.dtype), lambda: _clear(lagrangian(), nothing_left, -1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _logits(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The scores, float32 or wider, -inf where masked; and the rows that are masked entirely, (..., 1)."""
    logits = wide(scores)
    if mask is None:
        return logits, None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True = ignore), got {mask.dtype}")
    nothing_left = mask.all(-1, keepdim=True)
    # Such rows are computed as zeros and cleared afterwards, so that no NaN arises even in a backward pass.
    fill = torch.zeros_like(nothing_left, dtype=logits.dtype).masked_fill(~nothing_left, -math.inf)
    return torch.where(mask, fill, logits), nothing_left


def _clear(result: Tensor, nothing_left: Tensor | None, dim: int | None = None) -> Tensor:
    """The result, 0 in rows that are masked entirely; dim: the dimension that the result has not."""
    if nothing_left is None:
        return result
    return result.masked_fill(nothing_left if dim is None else nothing_left.squeeze(dim), 0.0)
