"""The forward solve and streaming on a GPU, where there is one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.basins import SOLVERS
from benchmarks.problems import Stretched
from benchmarks.suite.large import stretched
from benchmarks.suite.measure import Calls, Measure
from benchmarks.suite.row import Found
from benchmarks.suite.settings import Setting, counts
from benchmarks.suite.sizes import SIZES
from hopdeq_lwpf._types import Solution
from hopdeq_lwpf.streaming import TensorPatterns

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("solver", ["auto", "picard", "anderson"])
@pytest.mark.parametrize("name", SIZES.problems)
def bench_forward_on_gpu(measure: Measure, name: str, solver: str) -> None:
    setting = Setting.of(name, torch.float32, 1e-5, "cuda")

    def judge(solution: Solution) -> Found:
        return setting.judge(solution.state, *counts(solution))

    solve = partial(setting.solve, SOLVERS[solver])
    calls = Calls(solve, lambda: setting.image(setting.z0), device="cuda")
    measure(setting.case("forward, GPU", solver), calls, judge)


@pytest.mark.parametrize("method", ["screen=False", "default"])
def bench_streaming_on_gpu(measure: Measure, method: str) -> None:
    size = SIZES.streamed[0]
    patterns = torch.cat(list(Stretched(*size).blocks())).to("cuda")
    large = stretched(size, TensorPatterns(patterns), "cuda")
    given: dict[str, object] = {"screen": False} if method == "screen=False" else {}
    large.row(measure, large.case("streaming, GPU", method), given, device="cuda")
