"""Patterns on a curve, with noise: what lies near each other belongs together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.data.digits import PICTURE_SHAPE, load_digits
from hopdeq_lwpf.data.draws import check_number, check_seed, check_whole, stream

CURVES = ("rotated_digit", "fourier")


@dataclass(frozen=True)
class CurveSet:
    """Noisy points of one closed curve in R^d, centred, with mean square length 1 without noise.

    stored (N, d) at the angles `stored_angle` (N,); query (B, d) at `query_angle` (B,), with `target` (B, d) the
    points of the curve itself there. Angles are in [0, 2 pi), in increasing order.
    """

    stored: Tensor
    stored_angle: Tensor
    query: Tensor
    query_angle: Tensor
    target: Tensor


def make_curve(  # noqa: PLR0913 (one set, many dials)
    curve: str = "rotated_digit",
    *,
    stored: int = 128,
    queries: int = 128,
    stored_noise: float = 0.5,
    query_noise: float = 0.5,
    width: int = 64,
    waves: int = 3,
    seed: int = 0,
) -> CurveSet:
    """Stored patterns and queries near one closed curve.

    curve: "rotated_digit", a handwritten digit, drawn at random among the 1,797, turned about its centre, d = 64;
        "fourier", sum_m (a_m cos m t + b_m sin m t) / m over m = 1..waves with Gaussian a_m, b_m in R^width.
    stored, queries: how many points, at angles drawn uniformly. stored_noise, query_noise: length of the Gaussian noise
        on each, root mean square, over that of the curve's points about their centre: 1 is as much noise as signal.
    seed: of everything; one stream each for curve, angles and noise.

    Centred and scaled by the curve's own mean and size, which do not depend on the noise. Raises ValueError or
    TypeError for what makes no sense.
    """
    if curve not in CURVES:
        raise unknown("curve", curve, CURVES)
    for name, count in (("stored", stored), ("queries", queries), ("width", width), ("waves", waves)):
        check_whole(name, count, 1)
    check_number("stored_noise", stored_noise, 0.0)
    check_number("query_noise", query_noise, 0.0)
    check_seed("seed", seed)
    stored_angle, query_angle = (
        _angles(stream(seed, 1, which), n) for which, n in enumerate((stored, queries))
    )
    grid = torch.arange(360, dtype=torch.float64) * (math.pi / 180)
    draw = stream(seed, 0)
    points = _rotations(draw) if curve == "rotated_digit" else _waves(draw, width, waves)
    around = points(grid)
    center = around.mean(0)
    size = (around - center).square().sum(1).mean().sqrt()
    clean = [(points(angle) - center) / size for angle in (stored_angle, query_angle)]
    noisy = [
        part + noise / math.sqrt(part.shape[1]) * _normal(stream(seed, 2, which), part)
        for which, (part, noise) in enumerate(zip(clean, (stored_noise, query_noise), strict=True))
    ]
    tensors = (noisy[0], stored_angle, noisy[1], query_angle, clean[1])
    return CurveSet(*(tensor.to(torch.get_default_dtype()) for tensor in tensors))


def _angles(draw: np.random.RandomState, count: int) -> Tensor:
    return torch.from_numpy(np.sort(draw.uniform(0, 2 * math.pi, count)))


def _normal(draw: np.random.RandomState, like: Tensor) -> Tensor:
    return torch.from_numpy(draw.standard_normal(tuple(like.shape)))


def _rotations(draw: np.random.RandomState) -> Callable[[Tensor], Tensor]:
    """A digit turned by each angle, (n,) -> (n, 64), by bilinear interpolation; there is no ink outside of it."""
    pictures, _ = load_digits()
    picture = pictures[int(draw.randint(len(pictures)))].double().reshape(1, 1, *PICTURE_SHAPE)

    def points(angle: Tensor) -> Tensor:
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
        where = functional.affine_grid(turn, [len(angle), 1, *PICTURE_SHAPE], align_corners=False)
        turned = functional.grid_sample(picture.expand(len(angle), -1, -1, -1), where, align_corners=False)
        return turned.flatten(1)

    return points


def _waves(draw: np.random.RandomState, width: int, waves: int) -> Callable[[Tensor], Tensor]:
    """sum_m (a_m cos m t + b_m sin m t) / m, (n,) -> (n, width)."""
    factors = torch.from_numpy(draw.standard_normal((2, waves, width)))
    numbers = torch.arange(1, waves + 1, dtype=torch.float64)

    def points(angle: Tensor) -> Tensor:
        phase = angle[:, None] * numbers
        return (phase.cos() / numbers) @ factors[0] + (phase.sin() / numbers) @ factors[1]

    return points
