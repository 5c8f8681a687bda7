"""Pictures of one object each, brought to one size inside their frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from hopdeq_lwpf._types import check_float_tensor

BLOCK = 4096  # pictures at a time


def frame_pictures(pictures: Tensor, size: int, shape: tuple[int, int] | None = None) -> Tensor:
    """Scale what is drawn on each picture so that its longer side has `size` pixels, and centre it; (N, d) -> (N, d).

    pictures: row by row, in [0, 1], on a background of exactly 0; a picture without anything stays as it is.
    size: 24 gives MNIST's digits the frame of EMNIST (Cohen et al. 2017), 2 of 28 pixels on each side, where MNIST has
        20 pixels around a centre of mass. shape: (height, width); None: square.
    Proportions stay; values are interpolated (bicubic) and cut to [0, 1].
    Raises ValueError for pictures that are not square where no shape is given, and for a size that does not fit.
    """
    check_float_tensor("pictures", pictures)
    if pictures.ndim != 2:
        raise ValueError(f"pictures must have shape (N, height * width), got {tuple(pictures.shape)}")
    side = math.isqrt(pictures.shape[1])
    height, width = (side, side) if shape is None else shape
    if height * width != pictures.shape[1]:
        raise ValueError(f"pictures of {pictures.shape[1]} pixels are not {height} x {width}; give shape=")
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= min(height, width):
        raise ValueError(f"size must be a whole number from 1 to {min(height, width)}, got {size!r}")
    blocks = pictures.reshape(-1, 1, height, width).split(BLOCK)
    return torch.cat([_framed(block, size) for block in blocks]).reshape(pictures.shape)


def _framed(pictures: Tensor, size: int) -> Tensor:
    """(N, 1, h, w) -> the same."""
    top, tall = _extent((pictures != 0).any(3)[:, 0])
    left, wide = _extent((pictures != 0).any(2)[:, 0])
    height, width = pictures.shape[2:]
    longer = torch.maximum(tall, wide)
    some = longer > 0
    scale = torch.where(some, longer.clamp_min(1) / size, 1.0)  # source pixels a pixel of the result
    # In grid_sample's units the middle of the source is 0 and its edges are -1 and 1.
    across = torch.where(some, (2 * left + wide) / width - 1, 0.0)
    down = torch.where(some, (2 * top + tall) / height - 1, 0.0)
    zero = torch.zeros_like(scale)
    theta = torch.stack([torch.stack([scale, zero, across], -1), torch.stack([zero, scale, down], -1)], 1)
    grid = affine_grid(theta.to(pictures.dtype), list(pictures.shape), align_corners=False)
    return grid_sample(pictures, grid, mode="bicubic", align_corners=False).clamp_(0, 1)


def _extent(used: Tensor) -> tuple[Tensor, Tensor]:
    """Where the True of each row begin and how far they reach: (N, k) bool -> two of (N,), 0 where there is none."""
    first = used.to(torch.int8).argmax(1)
    last = used.shape[1] - used.flip(1).to(torch.int8).argmax(1)
    return first.double(), torch.where(used.any(1), last - first, 0).double()
