"""The handwritten digits that ship with the package."""

from __future__ import annotations

import gzip
from importlib import resources

import numpy as np
import torch
from torch import Tensor

PICTURE_SHAPE = (8, 8)
LEVELS = 16  # a pixel counts the set pixels of a 4 x 4 block


def load_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten 8 x 8 digits of the UCI repository (CC BY 4.0, see `DIGITS.txt`).

    Returns the pictures, (1797, 64) float32 in [0, 1], row by row, 1 is ink; and what was written,
    (1797,) int64 from 0 to 9. The order is that of the file.
    """
    packed = resources.files("hopdeq_lwpf.data").joinpath("digits.csv.gz").read_bytes()
    lines = gzip.decompress(packed).decode("ascii").splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    return torch.from_numpy(table[:, :-1] / LEVELS), torch.from_numpy(table[:, -1].astype(np.int64))
