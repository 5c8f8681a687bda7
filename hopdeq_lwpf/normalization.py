"""Normalised states: the activation g = dL/da of a visible Lagrangian, with the convex conjugate of L.

With a normalisation the state is z = g(a), a = X^T w [+ a q] being what the memories send back, and the energy
has L*(z) in place of |z|^2/2 (Krotov & Hopfield 2021, eq. 5-6, with the hidden neurons eliminated). L is convex,
so that one step is a step of the concave-convex procedure as without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf._types import resolve, wide

# By how many roundings of its dtype a state may lie outside of the domain of the conjugate.
ROUNDINGS = 8


class Normalization:
    """Base of the normalisations: over the last dimension, without parameters, computed in float32 or wider."""

    def lagrangian(self, a: Tensor) -> Tensor:
        """L(a), convex, in float32 or wider: (*batch, d) -> (*batch)."""
        raise NotImplementedError(f"{type(self).__name__} must override lagrangian(a)")

    def apply(self, a: Tensor) -> Tensor:
        """g(a) = dL/da, in the dtype of a: (*batch, d) -> (*batch, d)."""
        raise NotImplementedError(f"{type(self).__name__} must override apply(a)")

    def conjugate(self, g: Tensor) -> Tensor:
        """L*(g) = max over a of g.a - L(a), in float32 or wider: (*batch, d) -> (*batch).

        inf outside of its domain, where no state can lie; 8 roundings of the dtype of g are allowed for.
        """
        raise NotImplementedError(f"{type(self).__name__} must override conjugate(g)")


@dataclass(frozen=True)
class Sphere(Normalization):
    """L = |a|, g = a/|a|: states on the unit sphere. g(0) = 0, with a gradient of 0.

    L* is 0 on the unit ball.
    """

    def lagrangian(self, a: Tensor) -> Tensor:
        """|a|."""
        return torch.linalg.vector_norm(wide(a), dim=-1)

    def apply(self, a: Tensor) -> Tensor:
        """a/|a|."""
        wider = wide(a)
        # g does not depend on the scale; without it the squares of small or large entries leave the range.
        scale = wider.detach().abs().amax(-1, keepdim=True)
        nothing = scale == 0
        scaled = wider / scale.masked_fill(nothing, 1.0)
        square = scaled.square().sum(-1, keepdim=True).masked_fill(nothing, 1.0)
        return (scaled * square.rsqrt()).masked_fill(nothing, 0.0).to(a.dtype)

    def conjugate(self, g: Tensor) -> Tensor:
        """0, inf where |g| > 1."""
        square = wide(g).square().sum(-1)
        zero = torch.where(square.isnan(), square, 0.0)
        return _inside(square <= 1 + ROUNDINGS * torch.finfo(g.dtype).eps, zero)


@dataclass(frozen=True)
class LayerNorm(Normalization):
    """L = d sqrt(var(a) + eps), g = (a - mean)/sqrt(var + eps): layer normalisation without scale and shift.

    L* = -sqrt(d eps (d - |g|^2)) for g of mean 0 with |g|^2 <= d. eps: 1e-5, as `torch.nn.LayerNorm` has it.
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        if not number or not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be a finite number > 0, got {self.eps!r}")

    def lagrangian(self, a: Tensor) -> Tensor:
        """d sqrt(var(a) + eps)."""
        return a.shape[-1] * (wide(a).var(-1, correction=0) + self.eps).sqrt()

    def apply(self, a: Tensor) -> Tensor:
        """(a - mean)/sqrt(var + eps)."""
        centred = wide(a) - wide(a).mean(-1, keepdim=True)
        # Twice: rounding leaves a mean that is small for that of a, yet not for what is left.
        centred = centred - centred.mean(-1, keepdim=True)
        # Divided, not multiplied by rsqrt(), whose derivative overflows at a small eps.
        return (centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()).to(a.dtype)

    def conjugate(self, g: Tensor) -> Tensor:
        """-sqrt(d eps (d - |g|^2)), inf where g has a mean or |g|^2 > d."""
        wider, width = wide(g), g.shape[-1]
        slack = ROUNDINGS * torch.finfo(g.dtype).eps
        left = width - wider.square().sum(-1)
        inside = (wider.mean(-1).abs() <= slack) & (left >= -slack * width)
        return _inside(inside, -(width * self.eps * left.clamp_min(torch.finfo(left.dtype).tiny)).sqrt())


NORMALIZATIONS: dict[str, Normalization] = {"sphere": Sphere(), "layernorm": LayerNorm()}


def make_normalization(spec: None | str | Normalization) -> Normalization | None:
    """The normalisation of this name, or the one that is given; None stays None.

    Raises ValueError for a name that is not known, TypeError for anything else.
    """
    if spec is None:
        return None
    made: Normalization = resolve("normalize", spec, NORMALIZATIONS, Normalization, none=True)
    return made


def _inside(inside: Tensor, value: Tensor) -> Tensor:
    """The value, inf outside of the domain; NaN stays NaN."""
    return torch.where(inside | value.isnan(), value, math.inf)
