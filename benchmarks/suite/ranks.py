"""`python -m benchmarks.suite.ranks FOLDER N RANK`: a solve by one process, and by all of them, in turn."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.memory import Peak
from benchmarks.problems import Stretched
from benchmarks.suite.large import Large
from hopdeq_lwpf.streaming import TensorPatterns, split_patterns

PROCESSES, QUERIES, WIDTH, CLUSTERS, ROUNDS = 2, 64, 64, 100, 5


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _entry(large: Large, solves: list[float], passes: list[float], beside: float | None) -> dict[str, Any]:
    """What the table wants to know of one of the two."""
    with Peak() as peak:
        recall = large.recall(screen=False)
    low, middle, high = statistics.quantiles(solves, n=4)
    timed = {"ms": middle, "iqr": high - low, "f_ms": statistics.median(passes), "beside_ms": beside}
    return {"timed": timed, "found": dataclasses.asdict(large.judge(recall)), "peak_mb": peak.above}


def main(folder: Path, count: int, rank: int) -> None:
    """The first process writes told.json: times, counts and memory of both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    made = Stretched(count, WIDTH, CLUSTERS)
    patterns, query = torch.cat(list(made.blocks())), made.queries(QUERIES)[0]
    alone = Large("one", query, TensorPatterns(patterns), query[:0])
    shared = Large("both", query, split_patterns(patterns), query[:0])
    times: dict[str, tuple[list[float], list[float]]] = {"one": ([], []), "both": ([], [])}
    for turn in range(ROUNDS + 1):
        for large in (alone, shared):
            dist.barrier()
            if large is shared or rank == 0:
                taken = _timed(partial(large.recall, screen=False)), _timed(large.streamed_pass())
                for times_of, value in zip(times[large.what], taken, strict=True):
                    times_of += [value] * (turn > 0)  # the first turn warms up
    dist.barrier()
    told = {}
    if rank == 0:
        told["one"] = _entry(alone, *times["one"], None)
    dist.barrier()
    told["both"] = _entry(shared, *times["both"], statistics.median(times["one"][0] or [0.0]))
    if rank == 0:
        (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
