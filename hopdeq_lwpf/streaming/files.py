"""Stored patterns in a file that is mapped, not read."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hopdeq_lwpf.data.errors import DataError
from hopdeq_lwpf.streaming.sources import TensorPatterns

SUFFIXES = (".npy", ".safetensors")


class FilePatterns(TensorPatterns):
    """Patterns (N, d) in a mapped file; `tensor` is the map, on the CPU. Made by `open_patterns`."""

    def __init__(self, path: Path, tensor: Tensor, block: int | None = None) -> None:
        super().__init__(tensor, block)
        self.path = path.absolute()  # whatever the working folder is later

    def __reduce__(self) -> tuple[object, ...]:
        # A copy in another process maps the file again instead of carrying it.
        return open_patterns, (str(self.path), self.block)

    def __repr__(self) -> str:
        return f"open_patterns({str(self.path)!r}): {self.count} patterns of width {self.width}, {self.dtype}"


def open_patterns(path: str | os.PathLike[str], block: int | None = None) -> FilePatterns:
    """Stored patterns (N, d) from a file, mapped into memory: nothing is read before a solve asks for it.

        retrieve(queries, open_patterns("patterns.npy"), beta=8.0)

    path: .npy in C order (float64, float32, float16), or .safetensors with one matrix, or one called "patterns"
        (bfloat16 too). Blocks are converted to the dtype and the device of the queries.
    block: patterns a block; None: as many as keep the scores of a block in the cache.

    The file must stay as it is while it is in use: the system ends a process that reads a map of a file which was cut
    off meanwhile. Raises DataError, one line, for a file that is missing, cut off, of another kind, or holds no
    matrix of real numbers.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise DataError(f"{target}: the name must end in one of {', '.join(SUFFIXES)} to be mapped")
    if target.is_dir():
        raise DataError(f"{target}: is a folder, needs a file")
    try:
        tensor = _map_npy(target) if target.suffix == ".npy" else _map_safetensors(target)
    except (DataError, MemoryError):
        raise
    except OSError as error:
        raise DataError(f"{target}: {error.strerror or 'cannot be read'}") from error
    except Exception as error:  # a header is Python source, which a parser meets with errors of many kinds
        detail = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise DataError(f"{target}: is damaged, cut off, or no {target.suffix} file ({detail})") from error
    if not tensor.is_floating_point() or tensor.ndim != 2 or 0 in tensor.shape:
        raise DataError(
            f"{target}: needs a matrix of real numbers, one pattern a row; it holds {tuple(tensor.shape)} "
            f"{tensor.dtype}"
        )
    return FilePatterns(target, tensor, block)


def _map_npy(path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote, and of sizes that are no number
        # Copy on write: torch wants memory that may be written to, and nobody writes.
        array = np.lib.format.open_memmap(path, mode="c")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise DataError(f"{path}: needs float64, float32 or float16, got {array.dtype}")
    if not array.dtype.isnative or not array.flags.c_contiguous:
        raise DataError(
            f"{path}: is stored column by column or with bytes swapped, and such a file cannot be mapped; save "
            "np.ascontiguousarray(array) in the machine's byte order"
        )
    return torch.from_numpy(array)


def _map_safetensors(path: Path) -> Tensor:
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):
        pass  # safetensors has messages of its own for what the system says
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            wanted = ["patterns"] if "patterns" in names else names
            if len(wanted) != 1:
                raise DataError(
                    f"{path}: holds {len(names)} tensors {sorted(names)}; name one of them 'patterns'"
                )
            tensor: Tensor = file.get_tensor(wanted[0])
    except SafetensorError as error:
        detail = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: is damaged, cut off, or no safetensors file ({detail})") from error
    return tensor
