"""Where the weights of the entmax family end: projections on the simplex, found in a few passes, no gradient.

Every solver takes the scores s (*batch, N) and returns p (*batch, N). With u = (alpha - 1) s, p is a power of
max(u - tau, 0), and tau is approached from below: the norm of max(u - tau, 0) is a convex, falling function of
tau, so Newton's method never passes the root. Sorting 256 rows of 1,024 scores took 12 ms, this takes below 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Units of rounding by which a sum may miss 1; what is left is divided out.
ROUNDING = 8
# Newton's method ends by itself; this many passes are never needed, and a NaN ends it too.
MOST_PASSES = 100
# Groups whose maxima give the start, and the number of scores from which on that pays.
GROUPS, MANY = 32, 256
# alpha - 1 below this is raised to it: log1p(t y) / t is then y to the last bit, the limit.
SMALLEST = 1e-20
# 1 / (alpha - 1) above this amplifies the rounding of 1 + t y too much for a plain power.
LARGEST_POWER = 10.0


def sparsemax(scores: Tensor) -> Tensor:
    """alpha = 2: max(s - tau, 0). Newton's method is exact once the support is found."""
    eps = torch.finfo(scores.dtype).eps
    top, tau = _sparse_start(scores)
    p = torch.sub(scores, top).sub_(tau).relu_()
    total = p
    for _ in range(MOST_PASSES):
        total = p.sum(-1, keepdim=True)
        excess = total - 1
        if not _any_above(excess, ROUNDING * eps):
            break
        step = excess.clamp_min_(0).div_(p.sign().sum(-1, keepdim=True))
        p.sub_(step).relu_()
    return p.div_(total)


def _sparse_start(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum, and a lower bound of the threshold, relative to it: that of the maxima of a few groups.

    The threshold of a part of the scores is never above that of all. The high scores mostly lie in different
    groups, so that one or two passes remain.
    """
    if scores.shape[-1] < MANY:
        top = scores.amax(-1, keepdim=True)
        return top, torch.full_like(top, -1.0)
    parts = _maxima(scores)
    top = parts.amax(-1, keepdim=True)
    # Far below, so that no difference of two removed scores is taken.
    parts = (parts - top).clamp_min_(-2)
    # In the support lies what the scores above it exceed by less than 1 in all (Martins & Astudillo 2016).
    lead = (parts.unsqueeze(-1) - parts.unsqueeze(-2)).relu_().sum(-2)
    inside = (1 - lead).sign_().relu_()
    tau = ((inside * parts).sum(-1, keepdim=True) - 1).div_(inside.sum(-1, keepdim=True))
    return top, tau


def entmax15(scores: Tensor) -> Tensor:
    """alpha = 1.5: max(s/2 - tau, 0)^2. Newton's method on the norm of its root."""
    eps = torch.finfo(scores.dtype).eps
    root = torch.sub(scores, scores.amax(-1, keepdim=True)).mul_(0.5).add_(1).relu_()
    for _ in range(MOST_PASSES):
        norm = torch.linalg.vector_norm(root, dim=-1, keepdim=True)
        excess = norm - 1
        if not _any_above(excess, 0.5 * ROUNDING * eps):
            break
        step = excess.clamp_min_(0).mul_(norm).div_(root.sum(-1, keepdim=True))
        root.sub_(step).relu_()
    p = root.square_()
    return p.div_(p.sum(-1, keepdim=True))


def entmax(scores: Tensor, gamma: Tensor) -> Tensor:
    """alpha = 1 + gamma >= 1: max(1 + gamma (s - mu), 0)^(1/gamma); gamma (1, ..., 1) or (*batch, 1).

    In mu the limit gamma = 0 is regular: mu = logsumexp(s). Up to alpha = 2 mu is found by Newton's method from
    below, above, where p has a vertical slope at 0, by bisection.
    """
    if gamma.numel() == 1 and gamma.item() in _CLOSED:
        return _CLOSED[gamma.item()](scores)
    shifted = scores - scores.amax(-1, keepdim=True)
    power = _Power(gamma)
    p = _bisected(shifted, power) if bool((gamma > 1).any()) else _by_newton(shifted, power)[0]
    return p / p.sum(-1, keepdim=True)


class _Power:
    """p and its root 1 + gamma (s - mu), both 0 where there is no weight."""

    def __init__(self, gamma: Tensor) -> None:
        self.plain = bool((gamma * LARGEST_POWER >= 1).all())
        self.gamma = gamma.clamp_min(SMALLEST)
        inverse = self.gamma.reciprocal()
        self.inverse: Tensor | float = inverse.item() if inverse.numel() == 1 else inverse

    def __call__(self, shifted: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        if self.plain:
            # In this order rounding moves all roots of a row alike, also where they are small.
            root = torch.mul(shifted, self.gamma).add_(1 - self.gamma * mu).relu_()
            return root.pow(self.inverse), root
        tilt = torch.sub(shifted, mu).mul_(self.gamma).clamp_min_(-1)
        return tilt.log1p().mul_(self.inverse).exp_(), tilt.add_(1)

    def highest(self, count: int) -> Tensor:
        """The mu of so many equal scores: there is none above."""
        return -torch.expm1(-math.log(count) * self.gamma) / self.gamma


def _by_newton(shifted: Tensor, power: _Power) -> tuple[Tensor, Tensor]:
    """p for alpha <= 2, and mu."""
    count, gamma, eps = shifted.shape[-1], power.gamma, torch.finfo(shifted.dtype).eps
    # By Hoelder's inequality the mean bounds mu from below; near-uniform scores are done in two passes.
    mu = (power.highest(count) + shifted.mean(-1, keepdim=True)).clamp_min_(0)
    if count >= MANY:
        mu = torch.maximum(mu, _by_newton(_maxima(shifted), power)[1])
    tiny = torch.finfo(shifted.dtype).tiny
    p, root = power(shifted, mu)
    for _ in range(MOST_PASSES):
        total = p.sum(-1, keepdim=True)
        if not _any_above(total - 1, ROUNDING * eps):
            break
        # For the norm of the root, (sum p)^gamma, less 1; in the limit for log sum p.
        growth = total.log().clamp_min_(0)
        slope = p.div_(root.clamp_min_(tiny)).sum(-1, keepdim=True)
        step = torch.expm1(gamma * growth) / gamma * ((1 - gamma) * growth).exp() / slope
        before, mu = mu, mu + step
        p, root = power(shifted, mu)
        if not _any_above(mu - before, 0.0):
            break
    return p, mu


def _maxima(scores: Tensor) -> Tensor:
    """The maxima of interleaved groups, and that of what is left over."""
    length = scores.shape[-1] // GROUPS * GROUPS
    parts = scores[..., :length].unflatten(-1, (-1, GROUPS)).amax(-2)
    if length == scores.shape[-1]:
        return parts
    return torch.cat([parts, scores[..., length:].amax(-1, keepdim=True)], -1)


def _bisected(shifted: Tensor, power: _Power) -> Tensor:
    """p for any alpha, halving the interval until it is as narrow as rounding allows."""
    low = torch.zeros_like(shifted[..., :1])
    high = power.highest(shifted.shape[-1]).expand_as(low)
    for _ in range(MOST_PASSES):
        middle = 0.5 * (low + high)
        if not bool(((middle > low) & (middle < high)).any()):
            break
        above = power(shifted, middle)[0].sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return power(shifted, low)[0]


def _any_above(values: Tensor, limit: float) -> bool:
    return bool((values > limit).any())


_CLOSED: dict[float, Callable[[Tensor], Tensor]] = {
    0.0: lambda scores: torch.softmax(scores, -1),
    0.5: entmax15,
    1.0: sparsemax,
}
