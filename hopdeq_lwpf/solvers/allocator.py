"""Keeps the C library from handing memory back between evaluations."""

from __future__ import annotations

import functools

import torch

# The largest block by which glibc still adapts its thresholds is 32 MiB.
BLOCK = 30 * 2**20


@functools.cache
def settle() -> None:
    """Allocate and free one large block, once a process; its pages are never touched.

    glibc returns the top of the heap to the system once more than twice the largest freed block lies there.
    A step frees a few score matrices, so without this it gives up and faults in the same pages at every
    evaluation, which was measured to double the time of a solve. Elsewhere it does nothing.
    """
    torch.empty(BLOCK, dtype=torch.uint8)
