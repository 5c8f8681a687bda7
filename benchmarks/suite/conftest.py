"""The fixture that makes rows."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.suite.measure import Measure
from benchmarks.suite.report import TABLE
from hopdeq_lwpf import retrieve


@pytest.fixture(scope="session", autouse=True)
def _loaded() -> None:
    """What the first solve of a process loads belongs to no row."""
    retrieve(torch.eye(4), torch.eye(4))


@pytest.fixture
def measure(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Measure:
    return Measure(benchmark, request.config.stash[TABLE].add)
