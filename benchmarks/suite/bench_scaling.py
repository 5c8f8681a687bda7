"""How time grows with patterns and queries, and falls with processes."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.problems import Stretched
from benchmarks.suite.large import Large
from benchmarks.suite.measure import Calls, Measure
from benchmarks.suite.ranks import CLUSTERS, PROCESSES, QUERIES, WIDTH
from benchmarks.suite.row import Case, Found, Row, Target, Timed
from benchmarks.suite.sizes import SIZES
from hopdeq_lwpf.streaming import TensorPatterns

# 1.6 times as fast with two processes as with one.
SHARE = 1 / 1.6
MINUTES = 5


def bench_processes(measure: Measure) -> None:
    """One process with one thread, then two with one each: the same solve, in turn."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.suite.ranks", folder, str(SIZES.ranks)]
        running = [subprocess.Popen([*command, str(rank)]) for rank in range(PROCESSES)]
        try:
            codes = [process.wait(60 * MINUTES) for process in running]
        finally:
            for process in running:
                process.kill()
        assert codes == [0] * PROCESSES
        told = json.loads(Path(folder, "told.json").read_text(encoding="utf-8"))
    for name, note in (("one", "1 process, 1 thread"), ("both", f"{PROCESSES} processes, 1 thread each")):
        case = Case("scaling", "stretched", note, SIZES.ranks, QUERIES, WIDTH, "float32", 1e-5)
        timed = Timed(**told[name]["timed"])
        targets = (Target("relative", SHARE),) if name == "both" else ()
        measure.add(Row(case, Found(**told[name]["found"]), timed, told[name]["peak_mb"], targets))


def _slopes() -> list[tuple[str, int, int]]:
    first = SIZES.slope_patterns[0], SIZES.slope_queries[0]
    by_patterns = [("patterns", n, first[1]) for n in SIZES.slope_patterns]
    return by_patterns + [("queries", first[0], b) for b in SIZES.slope_queries]


POINTS: dict[str, list[tuple[float, float]]] = {"patterns": [], "queries": []}


def _slope(what: str, size: int, ms: float) -> str:
    """Slope of log time over log size, of all sizes so far."""
    points = POINTS[what]
    points.append((math.log(size), math.log(ms)))
    if len(points) < 2:
        return ""
    return f"slope {statistics.linear_regression(*zip(*points, strict=True)).slope:.2f}"


@pytest.mark.parametrize(("what", "count", "asked"), _slopes())
def bench_slope(measure: Measure, what: str, count: int, asked: int) -> None:
    """One streamed step over more and more patterns, or of more and more queries."""
    made = Stretched(count, WIDTH, CLUSTERS)
    query = made.queries(asked)[0]
    large = Large("stretched", query, TensorPatterns(torch.cat(list(made.blocks()))), query[:0])
    case = dataclasses.replace(large.case("scaling", f"one step, more {what}"), tolerance=None)
    note = partial(_slope, what, count if what == "patterns" else asked)
    measure(case, Calls(partial(large.recall, steps=1), large.streamed_pass()), large.judge, note=note)
