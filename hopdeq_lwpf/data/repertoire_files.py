"""Repertoires from and to DeepRC's files: metadata.tsv and one table for each repertoire."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.data.errors import DataError
from hopdeq_lwpf.data.files import staged_folder
from hopdeq_lwpf.data.repertoires import (
    PADDING,
    Repertoires,
    RepertoireSet,
    decode_sequences,
    encode_sequences,
)

METADATA = "metadata.tsv"
FOLDER = "repertoires"
ID = "ID"
SEQUENCE = "amino_acid"
COUNT = "templates"
# Not of DeepRC, whose reader passes over it: which sequences carry an implanted motif.
SIGNAL = "signal"


def write_repertoires(
    repertoires: RepertoireSet, folder: str | os.PathLike[str], *, target_column: str = "label"
) -> None:
    """Write `folder`/metadata.tsv (ID, `target_column`: + or -) and `folder`/repertoires/ID.tsv (amino_acid,
    templates, and signal, 0 or 1, where it is known), whole repertoires whatever `max_sequences`.

    Nothing is left half-written. Raises DataError where the folder already holds repertoires, or cannot be made.
    """
    target = Path(folder)
    for name in (METADATA, FOLDER):
        if (target / name).exists():
            raise DataError(f"{target / name}: is there already; choose another folder, or remove it")
    whole = repertoires.select(range(len(repertoires)))
    try:
        with staged_folder(target) as temporary:
            (temporary / FOLDER).mkdir()
            lines = [f"{ID}\t{target_column}"]
            for row, name in enumerate(whole.names):
                item = whole[row]
                lines.append(f"{name}\t{'+' if item['target'] > 0 else '-'}")
                (temporary / FOLDER / f"{name}.tsv").write_text(_table(item), encoding="utf-8")
            (temporary / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{target}: {error.strerror or 'cannot be written'}") from error


def _table(item: dict[str, Tensor]) -> str:
    columns = [decode_sequences(item["data"]), [str(count) for count in item["counts"].tolist()]]
    names = [SEQUENCE, COUNT]
    if "instance_target" in item:
        names.append(SIGNAL)
        columns.append([str(int(mark)) for mark in item["instance_target"].tolist()])
    lines = ["\t".join(cells) for cells in zip(*columns, strict=True)]
    return "\n".join(["\t".join(names), *lines]) + "\n"


def read_repertoires(
    folder: str | os.PathLike[str],
    *,
    target_column: str | None = None,
    positive: str = "+",
    id_column: str = ID,
    sequence_column: str = SEQUENCE,
    count_column: str | None = COUNT,
) -> RepertoireSet:
    """The repertoires of a folder in DeepRC's format: metadata.tsv, and repertoires/ID.tsv for each of its rows.

    target_column: the column of metadata.tsv that is to be predicted; None takes the only one beside the ID.
    positive: its value for positive repertoires. IDs may have the suffix .tsv or not; other columns and files
    are passed over. count_column: None counts every sequence once. A column `signal` (0 or 1), as
    `write_repertoires` writes it, becomes `instance_target` where all files have it.
    Raises DataError, one line with file and line number, for a missing file or column, a letter that is no amino
    acid, an empty sequence, a count that is no whole number of at least 0, a repertoire without sequences, an
    ID that comes twice, or no repertoire with the value `positive`.
    """
    root = Path(folder)
    metadata = root / METADATA
    header, rows = _read_table(metadata)
    id_at = _column(metadata, header, id_column)
    target_at = _column(metadata, header, target_column or _only_target(metadata, header, id_column))
    seen: dict[str, int] = {}
    parts = []
    for number, cells in rows:
        name = cells[id_at].removesuffix(".tsv")
        if not name:
            raise DataError(f"{metadata}: line {number} has an empty {id_column}")
        if name in seen:
            raise DataError(f"{metadata}: line {number} names {name!r} again, after line {seen[name]}")
        seen[name] = number
        file = root / FOLDER / f"{name}.tsv"
        if not os.path.isfile(file):  # which answers for names too long or with NUL, too
            raise DataError(f"{metadata}: line {number} names {name!r}, but there is no file {file}")
        parts.append(_read_repertoire(file, sequence_column, count_column))
    values = [cells[target_at] for _, cells in rows]
    if not rows:
        raise DataError(f"{metadata}: names no repertoire")
    if positive not in values:
        raise DataError(
            f"{metadata}: no repertoire has {positive!r} in column {header[target_at]!r}, which holds "
            f"{sorted(set(values))[:5]}; give positive="
        )
    return RepertoireSet(_store(parts, tuple(seen), [value == positive for value in values]))


Part = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _store(parts: list[Part], names: tuple[str, ...], positive: list[bool]) -> Repertoires:
    longest = max(part[0].shape[1] for part in parts)
    sequences = torch.full((sum(len(part[0]) for part in parts), longest), PADDING, dtype=torch.int8)
    ends = np.cumsum([0, *(len(part[0]) for part in parts)]).tolist()
    for part, start in zip(parts, ends, strict=False):
        sequences[start : start + len(part[0]), : part[0].shape[1]] = part[0]
    marks = [part[3] for part in parts if part[3] is not None]
    return Repertoires(
        sequences,
        torch.cat([part[1] for part in parts]),
        torch.cat([part[2] for part in parts]),
        tuple(ends),
        torch.tensor(positive).float(),
        names,
        torch.cat(marks) if len(marks) == len(parts) else None,
    )


def _read_repertoire(path: Path, sequence_column: str, count_column: str | None) -> Part:
    header, rows = _read_table(path)
    sequence_at = _column(path, header, sequence_column)
    if not rows:
        raise DataError(f"{path}: holds no sequences")
    texts = [cells[sequence_at] for _, cells in rows]
    for (number, _), text in zip(rows, texts, strict=True):
        if not text:
            raise DataError(f"{path}: line {number} has an empty {sequence_column}")
    try:
        sequences, lengths = encode_sequences(texts)
    except ValueError:
        _name_the_line(path, rows, texts)
        raise
    if count_column is None:
        counts = torch.ones(len(rows), dtype=torch.int64)
    else:
        counts = _whole_numbers(path, rows, _column(path, header, count_column), count_column)
    if SIGNAL not in header:
        return sequences, lengths, counts, None
    marks = _whole_numbers(path, rows, header.index(SIGNAL), SIGNAL, most=1)
    return sequences, lengths, counts, marks.bool()


Rows = list[tuple[int, list[str]]]


def _name_the_line(path: Path, rows: Rows, texts: list[str]) -> None:
    """Find the sequence that cannot be encoded and say in which line it stands."""
    for (number, _), text in zip(rows, texts, strict=True):
        try:
            encode_sequences([text])
        except ValueError as error:
            detail = str(error).removeprefix("sequence 0 ")
            raise DataError(f"{path}: line {number} {detail}; letters are upper case") from error


def _whole_numbers(path: Path, rows: Rows, at: int, column: str, most: int | None = None) -> Tensor:
    numbers = []
    for number, cells in rows:
        text = cells[at]
        # At most 18 digits: more may not fit into an int64.
        good = text.isascii() and text.isdigit() and len(text) <= 18
        if not good or (most is not None and int(text) > most):
            allowed = "a whole number of at least 0" if most is None else f"a whole number from 0 to {most}"
            raise DataError(f"{path}: line {number} has {column} {text[:40]!r}, which must be {allowed}")
        numbers.append(int(text))
    return torch.tensor(numbers, dtype=torch.int64)


def _column(path: Path, header: list[str], name: str) -> int:
    if name not in header:
        raise DataError(f"{path}: line 1: {unknown('column', name, header)}")
    return header.index(name)


def _only_target(path: Path, header: list[str], id_column: str) -> str:
    others = [name for name in header if name != id_column]
    if len(others) != 1:
        raise DataError(f"{path}: line 1 has the columns {others} beside {id_column}; give target_column=")
    return others[0]


def _read_table(path: Path) -> tuple[list[str], Rows]:
    """The names of the columns, and for each line that is not blank its number (from 1) and its cells."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a text file") from error
    # Not splitlines: it also splits at characters that are no line ends of a table.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    rows = [
        (number, [cell.strip() for cell in line.split("\t")])
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path}: is empty")
    (_, header), body = rows[0], rows[1:]
    for number, cells in body:
        if len(cells) != len(header):
            raise DataError(f"{path}: line {number} has {len(cells)} cells, the header {len(header)}")
    return header, body
