"""How large the problems of the suite are."""

from __future__ import annotations

import os
from dataclasses import dataclass

# Set by `python -m benchmarks --quick` before the suite is loaded.
QUICK_VARIABLE = "HOPDEQ_LWPF_QUICK"


@dataclass(frozen=True)
class Sizes:
    """Numbers of patterns, queries and dimensions; the defaults are those of `make bench`."""

    queries: int = 256
    problems: tuple[str, ...] = ("easy", "het", "span", "pfu", "random")
    gradients: tuple[str, ...] = ("het", "span")
    tight: tuple[str, ...] = ("span",)  # also at other tolerances and precisions
    one_step: int = 1024
    compiled: int | None = 4096
    overhead: str = "span"
    streamed: tuple[tuple[int, int, int], ...] = (
        (100_000, 64, 100),
        (1_000_000, 128, 1_000),
    )  # N, d, clusters
    screened: int = 98  # copies of 1,024 patterns; 0: the 1,024 alone
    judged: int = 32  # queries of large problems whose end is followed in float64
    ranks: int = 400_000
    slope_patterns: tuple[int, ...] = (50_000, 100_000, 200_000, 400_000)
    slope_queries: tuple[int, ...] = (64, 128, 256, 512)
    seconds: float = 0.6  # of timed calls a row
    rounds: tuple[int, int] = (3, 15)


QUICK = Sizes(
    queries=8,
    problems=("easy",),
    gradients=("easy",),
    tight=("easy",),
    one_step=64,
    compiled=None,
    overhead="easy",
    streamed=((2_000, 8, 4), (4_000, 16, 8)),
    screened=0,
    judged=4,
    ranks=2_000,
    slope_patterns=(500, 1_000),
    slope_queries=(4, 8),
    seconds=0.0,
    rounds=(1, 1),
)
IS_QUICK = os.environ.get(QUICK_VARIABLE) == "1"
SIZES = QUICK if IS_QUICK else Sizes()
