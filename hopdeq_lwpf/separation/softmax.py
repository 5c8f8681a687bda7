"""Softmax and its relatives: with a place for "none of them", and in the limit of infinite beta."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hopdeq_lwpf.separation.base import Separation


class Softmax(Separation):
    """L = log sum exp(s), p = softmax(s): Ramsauer et al. 2021."""

    has_energy = True

    def weights_of(self, logits: Tensor) -> Tensor:
        """softmax(s)."""
        return torch.softmax(logits, -1)

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """logsumexp(s)."""
        if not logits.requires_grad:
            return torch.logsumexp(logits, -1)
        # Its gradient in torch is exp(s - L), which is wrong where L is s to the last bit; this one's is softmax.
        top = logits.detach().amax(-1, keepdim=True).nan_to_num(0.0)
        return (logits - top).exp().sum(-1).log() + top.squeeze(-1)

    def both_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both, the second from the first."""
        weights, lagrangian = self.deferred_of(logits)
        return weights, lagrangian()

    def deferred_of(self, logits: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """Both; where no gradient is recorded, L = max s - log max p, two passes over the scores."""
        weights = self.weights_of(logits)
        if weights.requires_grad:
            return weights, lambda: self.lagrangian_of(logits)
        return weights, lambda: logits.amax(-1) - weights.amax(-1).log()


class Softmax1(Separation):
    """L = log(1 + sum exp(s)), p = exp(s) / (1 + sum exp(s)): softmax with a place for "none of them"."""

    has_energy = True

    def weights_of(self, logits: Tensor) -> Tensor:
        """The softmax of s and one more score 0, without that one's share."""
        return Softmax().weights_of(functional.pad(logits, (0, 1)))[..., :-1]

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """logsumexp of s and one more score 0."""
        return Softmax().lagrangian_of(functional.pad(logits, (0, 1)))

    def both_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from the same padded scores."""
        weights, lagrangian = Softmax().both_of(functional.pad(logits, (0, 1)))
        return weights[..., :-1], lagrangian


class HardMax(Separation):
    """L = max s, p = one-hot at the first maximum: the limit of softmax at infinite beta.

    The weights carry a gradient of zero, so that what they select can be trained through them.
    """

    has_energy = True

    def weights_of(self, logits: Tensor) -> Tensor:
        """One-hot at the first maximum."""
        return self.both_of(logits)[0]

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """max s, with a gradient at the first maximum only."""
        return logits.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)

    def both_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one search."""
        first = logits.argmax(-1, keepdim=True)
        top = logits.gather(-1, first)
        # A NaN score is passed on, as by softmax, not taken for the largest.
        zeros = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0)
        one = torch.ones_like(top).masked_fill(top.isnan(), math.nan).detach()
        return zeros.scatter(-1, first, one), top.squeeze(-1)
