"""Files of JSON lines that are only ever appended to: a line is there whole, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_line(path: Path, record: Mapping[str, Any], *, sync: bool = True) -> None:
    """Append one line, and with `sync` wait until the disk has it; makes the folder of the file.

    A line that was cut off before is ended first. Where the disk takes no more, the file is left as it was.
    Raises OSError for that, and for whatever else the system refuses.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            while line:
                line = line[os.write(handle, line) :]  # a disk that fills up takes a part first
            if sync:
                os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in the file; lines that are none, as one that is being written, are passed over."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def repair(path: Path) -> bool:
    """End or remove a last line that was cut off, as a power cut leaves one; whether there was one to remove."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb+") as file:
        text = file.read()
        if text.endswith(b"\n"):
            return False
        start = text.rfind(b"\n") + 1
        try:
            json.loads(text[start:])
        except ValueError:
            file.truncate(start)
            os.fsync(file.fileno())
            return True
        file.write(b"\n")
        os.fsync(file.fileno())
    return False
