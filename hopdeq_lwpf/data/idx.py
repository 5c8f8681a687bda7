"""IDX files: the format of MNIST, Fashion-MNIST, EMNIST and their kin."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from hopdeq_lwpf.data.errors import DataError, check_ratio

# The third byte of the file: which numbers it holds, big-endian.
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP_MAGIC = b"\x1f\x8b"
# A byte of a deflate stream stands for at most this many (RFC 1951: 258 bytes for two bits).
GZIP_MOST = 1032
LARGEST = 2**60  # numbers in an array, by far
MAX_DIMS = 64  # of numpy
CHUNK = 1 << 20
_NAME = re.compile(r"(^|[-._])idx\d*([-._]|$)", re.IGNORECASE)


def is_idx_name(path: str | os.PathLike[str]) -> bool:
    """Whether a file is called as IDX files are: `train-images-idx3-ubyte`, `a.idx`, any `.gz`."""
    name = Path(path).name
    return name.lower().endswith(".gz") or _NAME.search(name) is not None


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """The array of an IDX file, with the file's shape and type: uint8, int8, int16, int32, float32 or float64.

    Packed files are known by their first bytes, not by their name. MNIST's images come as (N, 28, 28) uint8,
    its labels as (N,) uint8. Nothing is allocated before the length of the file has been compared with what
    its header claims; a packed file is refused where its claim is more than deflate can hold, or more than a gigabyte
    and a hundred times its size.
    Raises DataError, one line, for a file that is missing, cut off, longer than its header says, or no IDX
    file.
    """
    target = Path(path)
    try:
        with target.open("rb") as file:
            packed = file.read(2) == GZIP_MAGIC
            file.seek(0)
            size = os.fstat(file.fileno()).st_size
            if not packed:
                return _read(target, file, size, exact=True)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _read(target, unpacked, size * GZIP_MOST, exact=False)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{target}: is damaged or cut off ({error})") from error
    except OSError as error:
        raise DataError(f"{target}: {error.strerror or 'cannot be read'}") from error


def read_idx_rows(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Tensor:
    """The items of an IDX file as rows, (N, d): bytes scaled from 0 ... 255 to [0, 1], other types as they are.

    Raises DataError as `read_idx` does, and for a file without items or with one number an item.
    """
    items = read_idx(path)
    if items.ndim < 2:
        raise DataError(f"{path}: needs one item a row, got shape {tuple(items.shape)}: these may be labels")
    if not items.numel():
        raise DataError(f"{path}: is empty (shape {tuple(items.shape)})")
    rows = items.flatten(1).to(dtype)
    return rows.div_(255) if items.dtype == torch.uint8 else rows


def _read(path: Path, file: BinaryIO, most: int, *, exact: bool) -> Tensor:
    """`most`: how many bytes there are, or may be at most where not `exact`."""
    kind, shape, header = _header(path, file)
    needed = math.prod(shape) * kind.itemsize
    claim = f"its header says {'x'.join(map(str, shape)) or 'one'} numbers of {kind.itemsize} bytes"
    # Sizes beside a 0 are not backed by any byte, and strides are their products.
    if not needed and math.prod(max(size, 1) for size in shape) > LARGEST:
        raise DataError(f"{path}: {claim}, more than an array can have")
    if header + needed > most:
        raise DataError(
            f"{path}: is cut off: {claim}, {header + needed} bytes in all, and the file has "
            f"{most if exact else f'at most {most}'}"
        )
    if not exact:
        check_ratio(path, needed, most // GZIP_MOST)
    body = _body(file, needed)
    if len(body) < needed:
        raise DataError(f"{path}: is cut off: {claim}, {needed} bytes, and there are {len(body)}")
    if file.read(1):
        raise DataError(f"{path}: goes on after its last number: {claim}, {header + needed} bytes in all")
    array = np.frombuffer(body, dtype=kind)
    if sys.byteorder == "little" and kind.itemsize > 1:
        array = array.byteswap(inplace=True)
    return torch.from_numpy(array.view(kind.newbyteorder("="))).reshape(shape)


def _header(path: Path, file: BinaryIO) -> tuple[np.dtype, tuple[int, ...], int]:
    magic = file.read(4)
    if len(magic) < 4:
        raise DataError(
            f"{path}: is no IDX file: it has {len(magic)} bytes" if magic else f"{path}: is empty"
        )
    if magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES:
        codes = ", ".join(f"{code:02x}" for code in IDX_TYPES)
        raise DataError(
            f"{path}: is no IDX file: it begins with {magic.hex(' ')}, not 00 00, a type ({codes}) and the "
            "number of dimensions"
        )
    count = magic[3]
    if count > MAX_DIMS:
        raise DataError(f"{path}: has {count} dimensions, more than the {MAX_DIMS} that an array can have")
    sizes = file.read(4 * count)
    if len(sizes) < 4 * count:
        raise DataError(f"{path}: is cut off within its header of {count} dimensions")
    return np.dtype(IDX_TYPES[magic[2]]), struct.unpack(f">{count}I", sizes), 4 + 4 * count


def _body(file: BinaryIO, needed: int) -> bytearray:
    # In pieces: one read of `needed` bytes would allocate them before it is known that they are there.
    body = bytearray()
    while len(body) < needed:
        piece = file.read(min(CHUNK, needed - len(body)))
        if not piece:
            break
        body += piece
    return body
