"""The memory that the tests of Memory share."""

from __future__ import annotations

import torch
from problems import normal

from hopdeq_lwpf import Memory

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ["ash", "birch", "cedar", "elm"]
# One more row for `trees`, and its value.
ROW = torch.zeros(1, 3, dtype=torch.float64)
READ = torch.zeros(1, 2, dtype=torch.float64)


def trees(**options):
    """Four patterns with values and labels."""
    return Memory(normal(4, 3), normal(4, 2, seed=1), NAMES, **options)


def content(memory):
    """All that a memory holds, in plain Python."""
    rows = [
        (s.id, s.pattern.tolist(), None if s.value is None else s.value.tolist(), s.label) for s in memory
    ]
    return rows, memory.dtype, memory.labels
