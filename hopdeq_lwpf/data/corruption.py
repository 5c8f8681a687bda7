"""Corruption of stored patterns into queries; every draw comes from the caller's generator."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from hopdeq_lwpf._types import check_float_tensor, unknown

Corruption = Callable[[Tensor, float, tuple[float, float], Generator], Tensor]


def _random_entries(patterns: Tensor, share: float, generator: Generator) -> Tensor:
    """(B, d) bool: exactly round(share d) entries of each row, drawn without replacement."""
    count = round(share * patterns.shape[-1])
    ranks = torch.rand(patterns.shape, generator=generator, dtype=torch.float64).argsort(-1)
    return ranks.to(patterns.device) < count


def _mask(patterns: Tensor, level: float, limits: tuple[float, float], generator: Generator) -> Tensor:
    return patterns.masked_fill(_random_entries(patterns, level, generator), limits[0])


def _occlude(patterns: Tensor, level: float, limits: tuple[float, float], _: Generator) -> Tensor:
    corrupted = patterns.clone()
    corrupted[:, patterns.shape[-1] - round(level * patterns.shape[-1]) :] = limits[0]
    return corrupted


def _noise(patterns: Tensor, level: float, limits: tuple[float, float], generator: Generator) -> Tensor:
    # Drawn in float64 so that the same seed gives the same noise for every dtype of the patterns.
    noise = torch.randn(patterns.shape, generator=generator, dtype=torch.float64).to(patterns)
    return patterns + level * (limits[1] - limits[0]) * noise


def _flip(patterns: Tensor, level: float, limits: tuple[float, float], generator: Generator) -> Tensor:
    flipped = limits[0] + limits[1] - patterns
    return torch.where(_random_entries(patterns, level, generator), flipped, patterns)


CORRUPTIONS: dict[str, Corruption] = {"mask": _mask, "occlude": _occlude, "noise": _noise, "flip": _flip}


def corrupt(
    patterns: Tensor,  # (B, d)
    kind: str,
    level: float,
    *,
    generator: Generator,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """A corrupted copy of `patterns`, (B, d); the original is left as it is.

    kind, and what `level` means for it:
      "mask": a share `level` of the entries of each row, at random places, is set to the lower limit;
      "occlude": the last share `level` of the entries is set to the lower limit; for a picture stored row by
        row these are its lowest rows, and 0.5 hides the lower half;
      "noise": Gaussian noise with a standard deviation of `level` times the range of the data is added, and
        not clipped, so that the noise stays Gaussian;
      "flip": a share `level` of the entries, at random places, is mirrored: x becomes lower + upper - x,
        which is 1 - x in [0, 1] and -x in [-1, 1].
    generator: a CPU generator; the same seed gives the same queries on every device.
    limits: (lower, upper) of the data; the default is that of pictures.
    Raises ValueError for an unknown kind, a negative level, or a share above 1.
    """
    check_float_tensor("patterns", patterns)
    if patterns.ndim != 2:
        raise ValueError(f"patterns must have shape (B, d), got {tuple(patterns.shape)}")
    if kind not in CORRUPTIONS:
        raise unknown("kind", kind, CORRUPTIONS)
    if not (math.isfinite(level) and level >= 0 and (kind == "noise" or level <= 1)):
        allowed = "at least 0" if kind == "noise" else "a share from 0 to 1"
        raise ValueError(f"level of {kind!r} must be {allowed}, got {level}")
    return CORRUPTIONS[kind](patterns, level, limits, generator)
