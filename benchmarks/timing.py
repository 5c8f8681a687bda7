"""Medians of interleaved runs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 2
) -> dict[str, float]:
    """Median milliseconds of each call, run in turn A B C A B C, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds + warmup):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if turn >= warmup:
                    times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}
