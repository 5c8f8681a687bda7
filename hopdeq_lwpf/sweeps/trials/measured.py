"""A trial that measures some numbers once and leaves no files: what goes wrong, and what its record says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from hopdeq_lwpf.sweeps.engine.jobs import failure
from hopdeq_lwpf.sweeps.engine.versions import versions


def measured(measure: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
    """The part of a record that is found out by calling `measure`, which returns numbers by name.

    A number that is not finite is None; what is raised is returned under "failure".
    """
    started = time.perf_counter()
    found: dict[str, Any] = {"curves": {}, "costs": {}, "warnings": [], "failure": None}
    try:
        numbers = measure()
        found["curves"] = {name: [value if math.isfinite(value) else None] for name, value in numbers.items()}
    except Exception as error:  # one trial must not end the study
        found["failure"] = failure(error)
    seconds = time.perf_counter() - started
    found["run_seconds"], found["costs"] = round(seconds, 3), {"seconds": round(seconds, 4)}
    found["versions"] = versions()
    return found
