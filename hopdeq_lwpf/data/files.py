"""Arrays from and to files. Reading errors are one class with one line; nothing is left half-written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hopdeq_lwpf.data.errors import DataError
from hopdeq_lwpf.data.idx import is_idx_name, read_idx, read_idx_rows
from hopdeq_lwpf.data.images import read_images
from hopdeq_lwpf.data.npy import read_npy, read_npz

SUFFIXES = (".npy", ".npz", ".csv")


def read_array(
    path: str | os.PathLike[str],
    *,
    names: Sequence[str] = (),
    width: int | None = None,
    finite: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The matrix in a file, (rows, width), converted to `dtype`.

    .npy: the array (object arrays are refused: reading them would run code). .npz: the only array in it, or
    the one that has one of `names`. .csv: comma-separated numbers, one row a line; a first line without any
    number is taken as a header. A folder: its images, grey, one a row, in [0, 1] (`read_images`). An IDX file,
    packed or not: one item a row, bytes scaled from 0 ... 255 to [0, 1] (`read_idx`); any .gz is taken for one.
    `width`: how many columns are needed, None for any. `finite`: whether NaN and inf are refused. dtype:
    float32 by default, which is what retrieval runs in.
    Raises DataError, with one line, for a file that is missing, empty, cut off, not numeric, not a matrix, of another
    width, or packed by more than a hundred times and larger than a gigabyte when it is unpacked.
    """
    tensor = _read_pictures(Path(path), dtype)
    if tensor is None:
        tensor = _read_matrix(Path(path), names, dtype)
    if width is not None and tensor.shape[1] != width:
        raise DataError(f"{path}: has rows of {tensor.shape[1]} numbers, but the patterns have {width}")
    if finite and not bool(tensor.isfinite().all()):
        row = int((~tensor.isfinite().all(-1)).nonzero()[0])
        raise DataError(f"{path}: row {row} (counted from 0) holds NaN or a value too large for {dtype}")
    return tensor


def _read_pictures(path: Path, dtype: torch.dtype) -> Tensor | None:
    """A folder of images or an IDX file as rows; None for other kinds of files."""
    if path.suffix in SUFFIXES:
        return None
    if path.is_dir():
        return read_images(path)[0].flatten(1).to(dtype)
    return read_idx_rows(path, dtype) if is_idx_name(path) else None


def _read_matrix(path: Path, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    array = _load(path, names)
    if array.ndim != 2:
        raise DataError(
            f"{path}: needs a matrix with one item a row, got shape {array.shape}"
            + (f"; reshape it to {(len(array), int(np.prod(array.shape[1:])))}" if array.ndim > 2 else "")
        )
    if 0 in array.shape:
        raise DataError(f"{path}: is empty (shape {array.shape})")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64)).to(dtype)


def read_indices(path: str | os.PathLike[str], *, count: int, limit: int) -> Tensor:
    """(count,) int64 indices in [0, limit) from a file of one number an item; DataError otherwise."""
    target = Path(path)
    packed = target.suffix not in SUFFIXES and is_idx_name(target)
    array = read_idx(target).numpy() if packed else _load(target, ("targets", "index"))
    if array.size != count or array.ndim > 2 or (array.ndim == 2 and 1 not in array.shape):
        raise DataError(f"{path}: needs one index for each of the {count} queries, got shape {array.shape}")
    flat = array.reshape(-1).astype(np.float64)
    if not bool(np.isfinite(flat).all()) or bool((flat != np.floor(flat)).any()):
        raise DataError(f"{path}: indices must be whole numbers")
    if flat.min() < 0 or flat.max() >= limit:
        raise DataError(
            f"{path}: indices must be from 0 to {limit - 1}, got {flat.min():g} to {flat.max():g}"
        )
    return torch.from_numpy(flat.astype(np.int64))


def _load(path: Path, names: Sequence[str]) -> np.ndarray:
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path}: the name must end in one of {', '.join(SUFFIXES)}, or be that of an IDX file or of a folder "
            "of images"
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty")
        if path.suffix == ".csv":
            return _load_csv(path)
        return read_npz(path, names) if path.suffix == ".npz" else read_npy(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'cannot be read'}") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _load_csv(path: Path) -> np.ndarray:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a text file") from error
    rows = [(number, line.split(",")) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if rows and not any(_is_number(cell) for cell in rows[0][1]):
        rows = rows[1:]
    if not rows:
        raise DataError(f"{path}: holds no numbers")
    width = len(rows[0][1])
    for number, cells in rows:
        if len(cells) != width:
            raise DataError(f"{path}: line {number} has {len(cells)} numbers, the first row has {width}")
        wrong = next((cell for cell in cells if not _is_number(cell)), None)
        if wrong is not None:
            raise DataError(f"{path}: line {number} holds {wrong.strip()[:40]!r}, which is not a number")
    return np.array([cells for _, cells in rows], dtype=np.float64)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`: takes its place when the block succeeds, is removed otherwise."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes the file private; results are meant to be shared
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files move into `path` when the block succeeds; otherwise none of them does.

    Files of the same name are replaced, others in `path` stay. Made beside `path`, so that a folder that
    cannot be written is found out before the work and not after it.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is a file, needs a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        target.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Tensor], main: str) -> None:
    """Write arrays by the suffix of `path`: all of them to .npz, only `arrays[main]` to .npy or .csv.

    Numbers in .csv have 9 significant digits, which bring a float32 back exactly. Raises DataError for
    another suffix or a folder that is not there; what stood at `path` stays whole until the new file is.
    """
    target = Path(path)
    check_output(target)
    columns = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
    with replacing(target) as temporary, temporary.open("wb") as file:
        if target.suffix == ".npz":
            np.savez_compressed(file, **columns)  # type: ignore[arg-type]
        elif target.suffix == ".npy":
            np.save(file, columns[main], allow_pickle=False)
        else:
            np.savetxt(file, columns[main], delimiter=",", fmt="%.9g")


def check_output(path: str | os.PathLike[str]) -> None:
    """DataError unless `path` has a known suffix and its folder is there; asked before the work is done."""
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise DataError(f"{target}: the name must end in one of {', '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise DataError(f"{target}: the folder {target.parent} does not exist")
    if target.is_dir():
        raise DataError(f"{target}: is a folder")
