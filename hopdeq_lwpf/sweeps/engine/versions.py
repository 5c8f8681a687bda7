"""The versions of everything that makes the numbers of a trial."""

from __future__ import annotations

import platform

import numpy as np
import torch

from hopdeq_lwpf import __version__


def versions() -> dict[str, str]:
    """By name, with the kind of the machine."""
    return {
        "hopdeq_lwpf": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
