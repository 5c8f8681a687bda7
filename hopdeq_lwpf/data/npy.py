"""Arrays of .npy and .npz files: nothing is allocated before the claim of a header has been held against the file."""

from __future__ import annotations

import io
import math
import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from hopdeq_lwpf.data.errors import DataError, check_ratio

MOST_HEADER = 1 << 16  # bytes; numpy itself refuses more than 10,000
LARGEST = 2**60  # numbers in an array, by far
MAGIC = b"\x93NUMPY"


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file; DataError for what is damaged or holds no real numbers, OSError as the system says."""
    with path.open("rb") as file:
        return _read(path, file, os.fstat(file.fileno()).st_size, ".npy")


def read_npz(path: Path, names: Sequence[str]) -> np.ndarray:
    """The only array of a .npz file, or the one that has one of `names`; raises as `read_npy` does."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            wanted = [name for name in names if name in members] or list(members)
            if len(wanted) != 1:
                asked = f"; name one of them {' or '.join(map(repr, names))}" if names else ""
                more = ", ..." * (len(members) > 8)
                shown = f"[{', '.join(map(repr, sorted(members)[:8]))}{more}]"
                raise DataError(f"{path}: holds {len(members)} arrays {shown}{asked}")
            entry = members[wanted[0]]
            with archive.open(entry) as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise DataError(f"{path}: holds {wanted[0][:80]!r}, which is no array")
            check_ratio(path, entry.file_size, min(entry.compress_size, path.stat().st_size))
            with archive.open(entry) as file:
                return _read(path, file, entry.file_size, ".npz")
    except (DataError, FileNotFoundError, IsADirectoryError, PermissionError, MemoryError):
        raise
    except Exception as error:  # unpackers meet broken data with errors of many kinds
        raise _damaged(path, ".npz", error) from error


def _read(path: Path, file: IO[bytes], size: int, suffix: str) -> np.ndarray:
    """The array that begins here, of a file or an entry of `size` bytes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote, and of what is no number
            shape, kind, header = _header(io.BytesIO(file.read(MOST_HEADER)))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the header is Python source, which a parser meets with errors of many kinds
        raise _damaged(path, suffix, error) from error
    if kind.hasobject:
        raise DataError(
            f"{path}: is no {suffix} file (Object arrays are refused: reading them would run code)"
        )
    if kind.kind not in "fiub":
        raise DataError(f"{path}: needs real numbers, got dtype {kind}")
    needed = math.prod(shape) * kind.itemsize
    # Sizes beside a 0 are not backed by any byte, and strides are their products.
    unreal = min(shape, default=0) < 0 or math.prod(max(length, 1) for length in shape) > LARGEST
    if unreal or header + needed > size:
        raise DataError(
            f"{path}: is damaged or cut off: its header says shape {shape} of {kind}, {header + needed} bytes in all, "
            f"and there are {size}"
        )
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise _damaged(path, suffix, error) from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and length of the header."""
    version = np.lib.format.read_magic(file)
    # Version 3 differs from 2 in the encoding of names of fields, of which an array of numbers has none.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version} of the format is not known")
    shape, _, kind = read(file)
    return shape, kind, file.tell()


def _damaged(path: Path, suffix: str, error: Exception) -> DataError:
    detail = (str(error).splitlines() or [""])[0][:200]
    return DataError(f"{path}: is damaged, cut off, or no {suffix} file ({detail or type(error).__name__})")
