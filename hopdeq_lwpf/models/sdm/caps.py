"""How much of a sphere lies within an angle of two points: the continuous twin of the circle intersection."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hopdeq_lwpf._types import check_float_tensor
from hopdeq_lwpf.models.sdm.counting import as_number, check_whole, log_outside_both
from hopdeq_lwpf.models.sdm.intersections import DECAY, gauss_legendre

# Enough for 3e-12 where it is hardest, just below d = n/2 at small n; elsewhere 24 reach rounding.
NODES = 40
# A logarithm's argument that rounding made 0.
TINY = 1e-300
# Angles at a time: temporaries of 512 kB stay in the cache.
BLOCK = 2**16


def log_cap_intersection(n: int, d: float, cosine: Tensor) -> Tensor:
    """ln of the share of the sphere S^(n-1) within the angle theta of both of two points: shape of cosine.

    n: dimension of the space, >= 2. d: Hamming radius, 0..n, not necessarily whole; theta = arccos(1 - 2d/n).
    cosine: floating-point, the cosine of the angle psi between the two points; values that rounding took
    beyond [-1, 1] count as the end. Returns float64; -inf where the caps do not meet (psi >= 2 theta).

    Turning one cap away from the other by dpsi takes from the intersection the rim between them, so that with
    tau the half angle (derived here; the same numbers as the incomplete beta integrals of Lee and Kim 2014)

        share = (1/pi) integral from psi/2 to theta of (1 - cos^2 theta / cos^2 tau)^((n-2)/2) dtau

    for theta <= pi/2, and by the complement beyond. It is differentiable in cosine, to any order; the slope
    is unbounded at cosine = 1, where it is cut at the rounding of cosine, and 0 where the caps do not meet.
    Raises ValueError or TypeError for other n, d and cosine.
    """
    n = check_whole("n", n, 2)
    if not 0 <= as_number(d) <= n:
        raise ValueError(f"d must be a number between 0 and n = {n}, got {d!r}")
    cosine = check_float_tensor("cosine", cosine).double()
    return _LogCap.apply(cosine, n, float(d))


def log_cap_fraction(n: int, d: float) -> float:
    """ln of the share of the sphere S^(n-1) within the angle arccos(1 - 2d/n) of one point; see above."""
    return float(log_cap_intersection(n, d, torch.ones((), dtype=torch.float64)))


class _LogCap(torch.autograd.Function):
    """The quadrature with its closed-form slope, so that no node is kept for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cosine: Tensor, n: int, d: float) -> Tensor:
        half = _half_angle(cosine)
        if 2 * d <= n:
            return _log_small(n, d, half)
        one = _log_small(n, n - d, torch.zeros((), dtype=torch.float64, device=cosine.device))
        return log_outside_both(one, _log_small(n, n - d, half))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, float], output: Tensor) -> None:
        cosine, ctx.n, ctx.d = inputs
        ctx.save_for_backward(cosine, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, output = ctx.saved_tensors
        return grad * _slope(cosine, output, ctx.n, ctx.d), None, None


def _half_angle(cosine: Tensor) -> Tensor:
    """psi / 2, with all digits of 1 - cosine."""
    return ((1 - cosine.clamp(-1, 1)) / 2).sqrt().asin()


def _slope(cosine: Tensor, log_share: Tensor, n: int, d: float) -> Tensor:
    """d log_share / d cosine = rim / (2 pi share sin psi), rim = (1 - cos^2 theta / cos^2 (psi/2))^((n-2)/2)."""
    cosine = cosine.clamp(-1, 1)
    edge = ((1 - 2 * d / n) ** 2 * 2 / (1 + cosine)).clamp(max=1)
    inside = ~((edge >= 1) | (log_share == -math.inf))  # True for NaN, which goes through
    edge, log_share = torch.where(inside, edge, 0.5), torch.where(inside, log_share, 0.0)
    sine = ((1 - cosine) * (1 + cosine)).clamp(min=torch.finfo(torch.float64).eps).sqrt()
    log_rim = (n - 2) / 2 * torch.log1p(-edge)
    return torch.where(inside, (log_rim - log_share).exp() / (2 * math.pi * sine), 0.0)


def _log_small(n: int, d: float, half: Tensor) -> Tensor:
    """The integral for theta <= pi/2, in blocks: shape of half."""
    flat = half.reshape(-1)
    parts = [_integrate(n, d, flat[start : start + BLOCK]) for start in range(0, flat.numel(), BLOCK)]
    return torch.cat(parts).reshape(half.shape) if parts else half.clone()


def _integrate(n: int, d: float, half: Tensor) -> Tensor:
    """ln of (1/pi) times the integral from half to theta: (B,) -> (B,)."""
    theta, power = 2 * math.asin(math.sqrt(d / n)), (n - 2) / 2
    cos, sin = 1 - 2 * d / n, 2 * math.sqrt(d * (n - d)) / n

    def log_integrand(tau: Tensor) -> Tensor:
        shift = cos * tau.tan()
        return power * ((sin - shift) * (sin + shift)).clamp(min=TINY).log()

    meets = ~(half >= theta)  # True for NaN, which goes through
    start = torch.where(meets, half, 0.0)
    first = log_integrand(start)
    # The angle at which the integrand has fallen by exp(-DECAY).
    lost = -math.expm1(-DECAY / power) if power else 1.0
    reach = (sin**2 * lost + (1 - lost) * (cos * start.tan()) ** 2).sqrt()
    end = torch.atan2(reach, torch.full_like(reach, cos))
    end = torch.maximum(end.clamp(max=theta), start)
    # In w = sqrt(theta - tau) the integrand is analytic, also for odd n, where it ends in a root.
    low, high = (theta - end).sqrt(), (theta - start).sqrt()
    total = torch.zeros_like(half)
    nodes, weights = gauss_legendre(NODES)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        w = low + (high - low) * ((1 + node) / 2)
        total = total + weight * w * (log_integrand(theta - w * w) - first).exp()
    result = first + (total * (high - low) / math.pi).log()
    return torch.where(meets, result, -math.inf)
