"""The forward solve: ours as a user calls it, torchdeq's stopped by an oracle, and a plain loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torchdeq import get_deq

from benchmarks.basins import SOLVERS
from benchmarks.peers import PEERS, PeerRun
from benchmarks.peers import measure as search
from benchmarks.suite.measure import Call, Calls, Counted, Measure
from benchmarks.suite.row import Found
from benchmarks.suite.settings import Setting, counts, plain_loop, written_out
from benchmarks.suite.sizes import SIZES
from hopdeq_lwpf._types import Solution

OURS = {
    "default": "auto",
    "Picard": "picard",
    "Anderson": "anderson",
    "L-BFGS without guard": "lbfgs, no guard",
}
CASES = [(name, torch.float32, 1e-5) for name in SIZES.problems]
CASES += [(name, *case) for name in SIZES.tight for case in ((torch.float32, 1e-4), (torch.float64, 1e-6))]
Method = tuple[Call, Any]


def _ours(setting: Setting, name: str) -> Method:
    def judge(solution: Solution) -> Found:
        return setting.judge(solution.state, *counts(solution))

    return partial(setting.solve, SOLVERS[OURS[name]]), judge


def _peer(setting: Setting, ran: PeerRun) -> Method:
    return ran.call(setting.image, setting.z0), lambda state: setting.judge(
        state, ran.iterations, ran.iterations
    )


def _counted(setting: Setting, method: Any, f: Any) -> Method:
    """A method that does not tell how often it evaluates f."""
    counted = Counted(f, len(setting.z0))
    with torch.no_grad():
        method(counted)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return method(f)

    return call, lambda state: setting.judge(state, counted.evaluations, counted.evaluations)


def _loop(setting: Setting) -> Method:
    return _counted(setting, lambda f: plain_loop(f, setting.z0, setting.tolerance), written_out(setting))


def _defaults(setting: Setting) -> Method:
    deq = get_deq().eval()
    return _counted(setting, lambda f: deq(f, setting.z0)[0][-1], setting.image)


@pytest.mark.parametrize("method", [*OURS, "plain loop", *PEERS, "torchdeq defaults"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]:g}")
def bench_forward(measure: Measure, case: tuple[str, torch.dtype, float], method: str) -> None:
    setting = Setting.of(*case)
    ran = search(method, setting.image, setting.z0, setting.tolerance) if method in PEERS else None
    if method in PEERS and ran is None:
        pytest.skip("raises: its linear system is singular")
    if ran is not None:
        call, judge = _peer(setting, ran)
    elif method in OURS:
        call, judge = _ours(setting, method)
    else:
        call, judge = _loop(setting) if method == "plain loop" else _defaults(setting)
    calls = Calls(
        call,
        lambda: setting.image(setting.z0),
        beside=None if method == "default" else partial(setting.solve, "auto"),
        once=ran is not None and bool(ran.unconverged),
    )
    measure(setting.case("forward", method), calls, judge)
