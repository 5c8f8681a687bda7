"""Lagrangians of a layer of neurons: L(s), the activation rho = dL/ds and its derivative (Krotov & Hopfield 2021).

s is the state of a layer before its activation, (*batch, n). With a forgetting unit D a layer has the Lagrangian
L(D(s)), whose activation is D' * rho(D(s)) (Ota et al. 2023, eq. 24-28, for any L).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hopdeq_lwpf._layout import attach, check_number, check_positive, shown
from hopdeq_lwpf._types import Matvec, identity, resolve, wide
from hopdeq_lwpf.forgetting import Forgetting, Keep, Threshold
from hopdeq_lwpf.normalization import LayerNorm as Standardized
from hopdeq_lwpf.normalization import Sphere as UnitSphere
from hopdeq_lwpf.separation import Separation, make_separation
from hopdeq_lwpf.separation.softmax import Softmax as SoftmaxWeights

# From here on softplus(x) = x to the last bit of float64; torch's own limit of 20 leaves an error of 2e-9.
EXACT = 40.0


class Lagrangian(nn.Module):
    """Base of the Lagrangians; a new one overrides `value` and `activate`, `slope` where it knows a formula.

    `convex`: whether L is convex; only then does the energy of a HAM fall.
    `increasing`: whether no activation is below 0; only then is L(D(s)) convex for every unit with an energy.
    `definite`: whether rho' is positive definite at every s, so that it can be the metric of a HAM.
    """

    convex: bool = False
    increasing: bool = False
    definite: bool = False

    def value(self, s: Tensor) -> Tensor:
        """L(s), in float32 or wider: (*batch, n) -> (*batch)."""
        raise NotImplementedError(f"{type(self).__name__} must override value(s)")

    def activate(self, s: Tensor) -> Tensor:
        """rho(s) = dL/ds, in the dtype of s: (*batch, n) -> (*batch, n)."""
        raise NotImplementedError(f"{type(self).__name__} must override activate(s)")

    def slope(self, s: Tensor) -> Matvec:
        """v -> rho'(s) v, (*batch, n) each; symmetric, since rho' is the Hessian of L."""
        with torch.enable_grad():
            pull = cast(Callable[..., tuple[Tensor]], torch.func.vjp(self.activate, s)[1])
        return lambda v: pull(v)[0]

    def inverse(self, r: Tensor) -> Tensor:
        """The s with rho(s) = r. Raises TypeError where several states have one activation."""
        raise TypeError(f"the activation of {type(self).__name__} has no inverse")


class Identity(Lagrangian):
    """L = |s|^2 / 2, rho = s: linear neurons, such as the visible ones of a modern Hopfield network."""

    convex = definite = True

    def value(self, s: Tensor) -> Tensor:
        return 0.5 * wide(s).square().sum(-1)

    def activate(self, s: Tensor) -> Tensor:
        return s

    def slope(self, s: Tensor) -> Matvec:
        return identity

    def inverse(self, r: Tensor) -> Tensor:
        return r


class Sigmoid(Lagrangian):
    """rho = sigmoid(gain (s - center)), L = softplus(gain (s - center)) / gain, summed over the neurons.

    The defaults make sigmoid(4 s - 2), the activation of Goemaere et al. 2024: of slope 1 at its centre, with most of
    its range for s in [0, 1]. gain: > 0, a number or a scalar tensor; a Parameter is learned. center: likewise.
    """

    convex = increasing = definite = True
    gain: float | Tensor
    center: float | Tensor

    def __init__(self, gain: float | Tensor = 4.0, center: float | Tensor = 0.5) -> None:
        super().__init__()
        check_positive("gain", gain)
        check_number("center", center)
        attach(self, "gain", gain)
        attach(self, "center", center)

    def value(self, s: Tensor) -> Tensor:
        if isinstance(self.gain, Tensor):
            return (
                functional.softplus(self.gain * (wide(s) - self.center), threshold=EXACT) / self.gain
            ).sum(-1)
        return functional.softplus(wide(s) - self.center, self.gain, EXACT).sum(-1)

    def activate(self, s: Tensor) -> Tensor:
        if isinstance(self.gain, Tensor) or isinstance(self.center, Tensor):
            return torch.sigmoid(self.gain * (s - self.center))
        return torch.sigmoid(torch.rsub(s, -self.gain * self.center, alpha=-self.gain))  # in one pass

    def slope(self, s: Tensor) -> Matvec:
        rho = self.activate(s)
        # 1 - rho would be 0 long before its own sigmoid is.
        slope = self.gain * rho * torch.sigmoid(self.gain * (self.center - s))
        return lambda v: slope * v

    def inverse(self, r: Tensor) -> Tensor:
        return torch.logit(r) / self.gain + self.center

    def extra_repr(self) -> str:
        return f"gain={self.gain}, center={self.center}"


class Tanh(Lagrangian):
    """rho = tanh(beta s), L = log cosh(beta s) / beta, summed over the neurons.

    beta: > 0, a number or a scalar tensor; a Parameter is learned.
    """

    convex = definite = True
    beta: float | Tensor

    def __init__(self, beta: float | Tensor = 1.0) -> None:
        super().__init__()
        check_positive("beta", beta)
        attach(self, "beta", beta)

    def value(self, s: Tensor) -> Tensor:
        size = wide(s).abs() * self.beta
        # cosh itself leaves the range of float32 at 89.
        return ((size + functional.softplus(-2 * size) - math.log(2.0)) / self.beta).sum(-1)

    def activate(self, s: Tensor) -> Tensor:
        return torch.tanh(self.beta * s)

    def slope(self, s: Tensor) -> Matvec:
        scaled = 2 * self.beta * s
        slope = 4 * self.beta * torch.sigmoid(scaled) * torch.sigmoid(-scaled)
        return lambda v: slope * v

    def inverse(self, r: Tensor) -> Tensor:
        return torch.atanh(r) / self.beta

    def extra_repr(self) -> str:
        return f"beta={shown(self.beta)}"


class Rectifier(Lagrangian):
    """L = max(s, 0)^2 / 2, rho = max(s, 0), summed over the neurons."""

    convex = increasing = True

    def value(self, s: Tensor) -> Tensor:
        return 0.5 * wide(s).relu().square().sum(-1)

    def activate(self, s: Tensor) -> Tensor:
        return s.relu()

    def slope(self, s: Tensor) -> Matvec:
        active = (s > 0).to(s.dtype)
        return lambda v: active * v


class Softmax(Lagrangian):
    """L = log sum exp(beta s) / beta, rho = softmax(beta s): neighbours that are linear make a modern Hopfield
    network of this layer and them, one stored pattern a neuron (Ramsauer et al. 2021).

    beta: inverse temperature, > 0, a number or a scalar tensor; a Parameter is learned. separation: another memory
    Lagrangian for log sum exp, by name or as an object of `separation`; one that is made for dot products.
    A forgetting unit of the layer sees s, not beta s; for ReLU, and for PFU and TopK with bias "threshold", and for
    TopK with bias 0, that is the same.
    """

    beta: float | Tensor

    def __init__(self, beta: float | Tensor = 1.0, separation: str | Separation = "softmax") -> None:
        super().__init__()
        check_positive("beta", beta)
        attach(self, "beta", beta)
        self.separation = made = make_separation(separation)
        if made.similarity != "dot":
            raise ValueError(
                f"separation {made!r} is made for {made.similarity} scores, which a layer has not; use one made "
                "for dot products, such as 'softmax' or 'entmax15'"
            )
        self.convex = self.increasing = made.has_energy

    def value(self, s: Tensor) -> Tensor:
        return self.separation.lagrangian(self.beta * s) / self.beta

    def activate(self, s: Tensor) -> Tensor:
        return self.separation.weights(self.beta * s)

    def slope(self, s: Tensor) -> Matvec:
        if not isinstance(self.separation, SoftmaxWeights):
            return super().slope(s)
        p = self.activate(s)
        return lambda v: self.beta * p * (v - (p * v).sum(-1, keepdim=True))

    def extra_repr(self) -> str:
        return f"beta={shown(self.beta)}, separation={self.separation!r}"


class LayerNorm(Lagrangian):
    """L = n sqrt(var(s) + eps), rho = (s - mean) / sqrt(var + eps): layer normalisation (Krotov & Hopfield 2021).

    eps: 1e-5, as `torch.nn.LayerNorm` has it.
    """

    convex = True

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.normalization = Standardized(eps)

    def value(self, s: Tensor) -> Tensor:
        return self.normalization.lagrangian(s)

    def activate(self, s: Tensor) -> Tensor:
        return self.normalization.apply(s)

    def slope(self, s: Tensor) -> Matvec:
        wider = wide(s)
        rate = (wider.var(-1, keepdim=True, correction=0) + self.normalization.eps).rsqrt()
        rho = (wider - wider.mean(-1, keepdim=True)) * rate

        def apply(v: Tensor) -> Tensor:
            centred = v - v.mean(-1, keepdim=True)
            return (rate * (centred - rho * (rho * centred).mean(-1, keepdim=True))).to(v.dtype)

        return apply

    def extra_repr(self) -> str:
        return f"eps={self.normalization.eps}"


class Sphere(Lagrangian):
    """L = |s|, rho = s / |s|: activations on the unit sphere. rho(0) = 0, with a derivative of 0."""

    convex = True

    def __init__(self) -> None:
        super().__init__()
        self.normalization = UnitSphere()

    def value(self, s: Tensor) -> Tensor:
        return self.normalization.lagrangian(s)

    def activate(self, s: Tensor) -> Tensor:
        return self.normalization.apply(s)

    def slope(self, s: Tensor) -> Matvec:
        rho = wide(self.activate(s))
        square = wide(s).square().sum(-1, keepdim=True)
        rate = torch.where(square == 0, 0.0, square.masked_fill(square == 0, 1.0).rsqrt())
        return lambda v: (rate * (v - rho * (rho * v).sum(-1, keepdim=True))).to(v.dtype)


# A name stands for a new object with its defaults, since a learned beta belongs to one layer.
LAGRANGIANS: dict[str, Callable[[], Lagrangian]] = {
    "identity": Identity,
    "layernorm": LayerNorm,
    "relu": Rectifier,
    "sigmoid": Sigmoid,
    "softmax": Softmax,
    "sphere": Sphere,
    "tanh": Tanh,
}


def make_lagrangian(spec: str | Lagrangian) -> Lagrangian:
    """The Lagrangian of this name, or the one that is given.

    Raises ValueError for a name that is not known, TypeError for anything else.
    """
    made = resolve("lagrangian", spec, LAGRANGIANS, Lagrangian)
    return cast(Lagrangian, made if isinstance(made, Lagrangian) else made())


class Neurons(nn.Module):
    """A layer of neurons: Lagrangian L and forgetting unit D, together L(D(s)).

    threshold: what the unit drew at the start of a solve, see `Forgetting.draw`; s: (B, n).
    """

    def __init__(self, lagrangian: Lagrangian, forgetting: Forgetting) -> None:
        super().__init__()
        self.lagrangian = lagrangian
        self.forgetting = forgetting

    @property
    def forgets(self) -> bool:
        return not isinstance(self.forgetting, Keep)

    @property
    def convex(self) -> bool:
        """Whether L(D(s)) is convex with the activation as its (sub)gradient; see `Forgetting.has_energy`."""
        unit = not self.forgets or (self.lagrangian.increasing and self.forgetting.has_energy)
        return bool(self.lagrangian.convex and unit)

    @property
    def symmetric(self) -> bool:
        """Whether `slope` is the whole derivative of `activate`, hence symmetric."""
        return self.forgetting.self_adjoint

    @property
    def definite(self) -> bool:
        """Whether `slope` is positive definite at every s."""
        return self.lagrangian.definite and not self.forgets

    def value(self, s: Tensor, threshold: Threshold = None) -> Tensor:
        """L(D(s)): (B, n) -> (B,)."""
        return self.lagrangian.value(self.forgetting.project(s, threshold)[0])

    def activate(self, s: Tensor, threshold: Threshold = None) -> Tensor:
        """D' * rho(D(s)): (B, n) -> (B, n)."""
        value, kept = self.forgetting.project(s, threshold)
        rho = self.lagrangian.activate(value)
        return rho if kept is None else rho * kept

    def slope(self, s: Tensor, threshold: Threshold = None) -> Matvec:
        """v -> D' * rho'(D(s)) (D' * v), (B, n) each."""
        value, kept = self.forgetting.project(s, threshold)
        inner = self.lagrangian.slope(value)
        return inner if kept is None else lambda v: kept * inner(kept * v)

    def kept(self, s: Tensor, threshold: Threshold = None) -> Tensor | None:
        """How many neurons are kept, (B,); None where the unit keeps all."""
        kept = self.forgetting.project(s, threshold)[1]
        return None if kept is None else kept.sum(-1)
