"""Separation functions: the gradient p of a memory Lagrangian L(s), over the last dimension.

Every L here is convex, symmetric and non-decreasing, so that the retrieval update with p is a step of the
concave-convex procedure on the energy |z|^2/2 - L(beta X z)/beta, with partial forgetting too where the
unit says so (Ota et al. 2023, eq. 24-28).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from hopdeq_lwpf._types import unknown, wide


class Separation:
    """Base of the separation functions. They hold no state: any number of models may share one.

    A new one overrides `weights_of` and `lagrangian_of`, which see logits (*batch, N) with N >= 1 in float32
    or wider, masked entries -inf, and no row that is masked entirely; and `both_of` where the two share work.
    `has_energy`: whether L is convex, symmetric and non-decreasing with the weights as its gradient.
    """

    has_energy: bool = False

    def weights_of(self, logits: Tensor) -> Tensor:
        """p(s): (*batch, N) -> (*batch, N)."""
        raise NotImplementedError(f"{type(self).__name__} must override weights_of(logits)")

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """L(s): (*batch, N) -> (*batch)."""
        raise NotImplementedError(f"{type(self).__name__} must override lagrangian_of(logits)")

    def both_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """p(s) and L(s)."""
        return self.weights_of(logits), self.lagrangian_of(logits)

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
        if not scores.shape[-1]:
            return scores, wide(scores).sum(-1)
        logits, nothing_left = _logits(scores, mask)
        weights, lagrangian = self.both_of(logits)
        return _clear(weights, nothing_left).to(scores.dtype), _clear(lagrangian, nothing_left, -1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Softmax(Separation):
    """L = log sum exp(s), p = softmax(s): Ramsauer et al. 2021."""

    has_energy = True

    def weights_of(self, logits: Tensor) -> Tensor:
        """softmax(s)."""
        return torch.softmax(logits, -1)

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """logsumexp(s)."""
        return torch.logsumexp(logits, -1)

    def both_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both; where no gradient is recorded, L = max s - log max p, two passes over the scores."""
        weights = self.weights_of(logits)
        if weights.requires_grad:
            return weights, self.lagrangian_of(logits)
        return weights, logits.amax(-1) - weights.amax(-1).log()


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


class Sparsemax(Separation):
    """p = projection of s on the simplex, exactly 0 for low scores: Martins & Astudillo 2016, algorithm 1.

    L = max over p of p.s - |p|^2/2 + 1/2, the constant chosen so that L = max s where the largest score leads
    by 1 or more and p is one-hot. Twice differentiable away from changes of the support.
    """

    has_energy = True

    def weights_of(self, logits: Tensor) -> Tensor:
        """max(s - tau, 0)."""
        return self._solve(logits)[0]

    def lagrangian_of(self, logits: Tensor) -> Tensor:
        """L(s)."""
        return self.both_of(logits)[1]

    def both_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one threshold."""
        weights, inside, tau, top = self._solve(logits)
        # p.s - |p|^2/2 = p.(s + tau)/2 on the support.
        lagrangian = 0.5 * (weights * (inside + tau)).sum(-1) + 0.5 + top.squeeze(-1)
        return weights, lagrangian

    @staticmethod
    def _solve(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights, scores inside the support (0 outside), threshold tau and maximum; both shifted by it."""
        with torch.no_grad():
            top = logits.amax(-1, keepdim=True)
            # What lies 1 below the maximum is never in the support; made equal, it sorts far faster.
            ranked = (logits - top).clamp_min(-1).sort(-1, descending=True).values
            rank = torch.arange(1, logits.shape[-1] + 1, dtype=logits.dtype, device=logits.device)
            size = (1 + rank * ranked > ranked.cumsum(-1)).sum(-1, keepdim=True)
            support = logits - top >= ranked.gather(-1, (size - 1).clamp_min(0))
        shifted = logits - top
        inside = torch.where(support, shifted, 0.0)
        tau = (inside.sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
        return (shifted - tau).relu(), inside, tau, top


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


SEPARATIONS: dict[str, Separation] = {
    "softmax": Softmax(),
    "sparsemax": Sparsemax(),
    "softmax1": Softmax1(),
    "hardmax": HardMax(),
}


def register_separation(name: str, separation: Separation) -> None:
    """Make a separation function known under a name.

    Raises TypeError for anything but an instance of `Separation`, ValueError for a name that is taken.
    """
    if not isinstance(name, str) or not isinstance(separation, Separation):
        raise TypeError(
            f"register_separation needs a name and a Separation instance, got {name!r}, {separation!r}"
        )
    if name in SEPARATIONS:
        raise ValueError(f"separation {name!r} is taken by {SEPARATIONS[name]!r}; choose another name")
    SEPARATIONS[name] = separation


def make_separation(spec: str | Separation) -> Separation:
    """The separation function of this name, or the one that is given.

    Raises ValueError for a name that is not known, TypeError for anything else.
    """
    if isinstance(spec, Separation):
        return spec
    if not isinstance(spec, str):
        hint = f"; did you mean {spec.__name__}()?" if isinstance(spec, type) else ""
        raise TypeError(f"separation must be a name or a Separation instance, got {spec!r}{hint}")
    if spec not in SEPARATIONS:
        raise unknown("separation", spec, SEPARATIONS)
    return SEPARATIONS[spec]


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
