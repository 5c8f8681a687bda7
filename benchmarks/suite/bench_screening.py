"""Screening: the solve on candidates, verified on all patterns, beside the solve on all patterns."""

from __future__ import annotations

import functools

import pytest

from benchmarks.problems import clustered, rotated, separated
from benchmarks.suite.large import Large, plain_limit
from benchmarks.suite.measure import Measure
from benchmarks.suite.row import Target
from benchmarks.suite.sizes import IS_QUICK, SIZES
from hopdeq_lwpf.streaming import TensorPatterns

SOLVERS = {"default": "auto", "Picard": "picard"}
SCREENS = {"off": False, "on": True}


@functools.cache
def _problem(copies: int) -> Large:
    """So many rotated copies of span, or its 1,024 patterns alone."""
    name = f"span, {copies} copies" if copies else "span"
    if IS_QUICK:
        name, (patterns, query) = "easy", separated(queries=SIZES.queries)
    elif copies:
        patterns, query = rotated(copies, SIZES.queries)
    else:
        patterns, query = clustered(0.9, 0.995, queries=SIZES.queries)
    ends = plain_limit(patterns, query[: SIZES.judged])
    return Large(name, query.float(), TensorPatterns(patterns.float()), ends)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("copies", sorted({0, SIZES.screened}))
def bench_screening(measure: Measure, copies: int, solver: str, screen: str) -> None:
    large = _problem(copies)
    given: dict[str, object] = {"solver": SOLVERS[solver], "screen": SCREENS[screen]}
    off = {**given, "screen": False} if screen == "on" else None
    targets = (Target("relative", 1.0 if copies else 1.1),) if off else ()
    case = large.case("screening", f"{solver}, screen {screen}")
    large.row(measure, case, given, beside=off, targets=targets)
