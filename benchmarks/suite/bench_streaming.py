"""Patterns that are looked at in blocks: time over that of the passes, and memory above the file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.problems import Stretched
from benchmarks.suite.large import Large, stretched
from benchmarks.suite.measure import Measure
from benchmarks.suite.row import Target
from benchmarks.suite.sizes import SIZES
from hopdeq_lwpf import open_patterns
from hopdeq_lwpf.streaming import TensorPatterns

METHODS: dict[str, dict[str, object]] = {"stream=True, screen=False": {"screen": False}, "default": {}}
IN_MEMORY, IN_FILE = SIZES.streamed
OVER_PASSES = Target("overhead", 0.3)
FREE = 4  # times the size of the file that the disk must have left


@pytest.fixture(scope="module")
def tensor() -> Large:
    return stretched(IN_MEMORY, TensorPatterns(torch.cat(list(Stretched(*IN_MEMORY).blocks()))))


@pytest.fixture(scope="module")
def file() -> Iterator[Large]:
    count, width, _ = IN_FILE
    with tempfile.TemporaryDirectory() as folder:
        size = 4 * count * width
        if shutil.disk_usage(folder).free < FREE * size:
            pytest.skip(f"{folder} has less than {FREE * size / 1e9:.1f} GB left")
        path = Path(folder, "patterns.npy")
        mapped = np.lib.format.open_memmap(path, "w+", np.float32, (count, width))
        start = 0
        for block in Stretched(*IN_FILE).blocks():
            mapped[start : start + len(block)] = block.numpy()
            start += len(block)
        mapped.flush()
        del mapped
        yield stretched(IN_FILE, open_patterns(path))


@pytest.mark.parametrize("method", METHODS)
def bench_tensor(measure: Measure, tensor: Large, method: str) -> None:
    case, beside = tensor.case("streaming", method), METHODS["default"]
    tensor.row(measure, case, METHODS[method], beside=beside, targets=(OVER_PASSES,))


@pytest.mark.parametrize("method", METHODS)
def bench_mapped_file(measure: Measure, file: Large, method: str) -> None:
    case = file.case("streaming, mapped file", method)
    file.row(measure, case, METHODS[method], targets=(OVER_PASSES, Target("peak_mb", 500)))
