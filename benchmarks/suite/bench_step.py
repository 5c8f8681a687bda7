"""One step: attention of PyTorch, f, and `retrieve(steps=1)`."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.peers import residual
from benchmarks.suite.measure import Call, Calls, Measure
from benchmarks.suite.row import Found
from benchmarks.suite.settings import Setting, problem, written_out
from benchmarks.suite.sizes import SIZES
from hopdeq_lwpf import retrieve
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.retrieval import Retrieval

UNITS = {"softmax": None, "PFU": PFU(0.0)}  # half of the patterns are forgotten
METHODS = ("f", "retrieve(steps=1)", "plain PyTorch", "scaled_dot_product_attention")


def _setting(unit: str, count: int) -> Setting:
    given = problem("easy")  # of which one step is all that is taken: any patterns do
    repeats = -(-count // len(given.patterns))
    patterns = given.patterns.float().repeat(repeats, 1)[:count]
    f = Retrieval(given.beta, forgetting=UNITS[unit])
    x = f.prepare(given.query.float(), patterns)
    return Setting("easy", torch.float32, 0.0, f, x, f.init(x))


def _one(setting: Setting, state: Tensor) -> Found:
    return Found(1, 1, float(residual(setting.image, state).max()))


def _call(setting: Setting, method: str) -> Call:
    query, patterns, beta = setting.z0, setting.x.patterns, setting.f.beta
    if method == "scaled_dot_product_attention":
        q, k = query[None], patterns[None]
        return lambda: functional.scaled_dot_product_attention(q, k, k, scale=float(beta))[0]
    if method == "retrieve(steps=1)":
        return lambda: retrieve(query, patterns, beta=beta, forgetting=setting.f.forgetting, steps=1).value
    plain = written_out(setting)
    return {"f": lambda: setting.image(query), "plain PyTorch": lambda: plain(query)}[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unit", UNITS)
def bench_one_step(measure: Measure, unit: str, method: str) -> None:
    if unit != "softmax" and method == METHODS[-1]:
        pytest.skip("scaled_dot_product_attention has no forgetting")
    setting = _setting(unit, SIZES.one_step)
    case = dataclasses.replace(setting.case("one step", method), what=unit, tolerance=None)
    with torch.no_grad():
        calls = Calls(_call(setting, method), lambda: setting.image(setting.z0))
        measure(case, calls, partial(_one, setting))


def bench_compiled(measure: Measure) -> None:
    if SIZES.compiled is None:
        pytest.skip("compiling takes longer than the quick suite may")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no pool of processes that stay
    setting = _setting("PFU", SIZES.compiled)
    compiled = torch.compile(setting.f)
    case = dataclasses.replace(setting.case("one step", "f, torch.compile"), what="PFU", tolerance=None)
    with torch.no_grad():
        compiled(setting.z0, setting.x)
        calls = Calls(lambda: compiled(setting.z0, setting.x), lambda: setting.image(setting.z0))
        measure(case, calls, partial(_one, setting))
