"""How a row is measured: a call in turn with f alone, and with what it is compared with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.memory import Peak
from benchmarks.suite.row import Case, Found, Row, Target, Timed
from benchmarks.suite.sizes import SIZES

Call = Callable[[], Any]
MOST_IN_A_ROW = 30  # evaluations of f alone, timed together before each call
HEAVY = 2.0  # seconds from which a call is timed once


class Counted:
    """f, counting its evaluations and the products with its transposed Jacobian, in batches of `size` queries."""

    def __init__(self, f: Callable[[Tensor], Tensor], size: int) -> None:
        self.f, self.size = f, size
        self.evaluations = self.products = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        self.evaluations += len(z) / self.size
        image: Tensor = _Counting.apply(self.f(z), self)
        return image


class _Counting(torch.autograd.Function):
    """The identity, which notes that a gradient came through."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, counted: Counted) -> Tensor:
        ctx.counted = counted
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.counted.products += len(gradients[0]) / ctx.counted.size
        return gradients[0], None


@dataclass(frozen=True)
class Calls:
    """What a row runs: a solve, and in turn with it one evaluation of f, one product with its transposed Jacobian, and
    what the column `relative` compares with. once: a single solve is timed, as where one takes over HEAVY seconds.
    """

    solve: Call
    f: Call
    product: Call | None = None
    beside: Call | None = None
    once: bool = False
    device: str = "cpu"


def synchronised(call: Call, device: str) -> Call:
    """The call, and on a GPU the wait for its end."""

    def both() -> Any:
        result = call()
        if device != "cpu":
            torch.cuda.synchronize()
        return result

    return both


class Measure:
    """Makes rows; the fixture `measure` of the suite."""

    def __init__(self, benchmark: BenchmarkFixture, add: Callable[[Row], None]) -> None:
        self.benchmark, self.add = benchmark, add

    def __call__(
        self,
        case: Case,
        calls: Calls,
        judge: Callable[[Any], Found],
        targets: tuple[Target, ...] = (),
        note: Callable[[float], str] | None = None,
    ) -> None:
        """One row. judge: what the result of `calls.solve` is worth. note: what the row says of its milliseconds."""
        calls = dataclasses.replace(
            calls, solve=synchronised(calls.solve, calls.device), f=synchronised(calls.f, calls.device)
        )
        calls.f()
        start = time.perf_counter()
        result, peak = _peak(calls.solve, calls.device)
        seconds = time.perf_counter() - start
        found = judge(result)
        timed = self._time(calls, found, seconds)
        self.add(Row(case, found, timed, peak, targets, "" if note is None else note(timed.ms)))

    def _time(self, calls: Calls, found: Found, seconds: float) -> Timed:
        least, most = SIZES.rounds
        heavy = seconds > HEAVY
        single = heavy or calls.once
        rounds = 1 if single else max(least, min(most, round(SIZES.seconds / max(seconds, 1e-6))))
        sides = {"f": calls.f, "product": calls.product, "beside": calls.beside}
        often = {"f": found.evaluations, "product": found.products, "beside": 1}
        times: dict[str, list[float]] = {name: [] for name in sides}

        def in_turn() -> None:
            for name, side in sides.items():
                if side is None:
                    continue
                count = 1 if heavy else max(1, min(MOST_IN_A_ROW, round(often[name])))
                start = time.perf_counter()
                for _ in range(count):
                    side()
                times[name].append((time.perf_counter() - start) / count)

        self.benchmark.pedantic(calls.solve, setup=in_turn, rounds=rounds, warmup_rounds=0 if single else 1)
        if single:
            in_turn()
        stats = self.benchmark.stats.stats
        # The first round of the others warmed up, as that of the call did.
        medians = {name: _median(taken if single else taken[1:]) for name, taken in times.items() if taken}
        spread = 1e3 * stats.iqr if rounds > 1 else None
        return Timed(
            1e3 * stats.median, spread, medians["f"], medians.get("product", 0.0), medians.get("beside")
        )


def _median(seconds: list[float]) -> float:
    return 1e3 * float(torch.tensor(seconds, dtype=torch.float64).quantile(0.5))


def _peak(call: Call, device: str) -> tuple[Any, float]:
    """The result of the call, and MB that it took above what was there: of the process, or of the GPU."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), (torch.cuda.max_memory_allocated() - before) / 1e6
    with Peak() as peak:
        result = call()
    return result, peak.above
