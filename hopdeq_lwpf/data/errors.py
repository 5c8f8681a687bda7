"""The one error for what files hold, and what packed files may not claim."""

from __future__ import annotations

from pathlib import Path

# Packed data that would take more than so many bytes, and more than so many for each of its own, is refused: a
# megabyte of zeros in a file can stand for a gigabyte. A gigabyte of pictures packs by far less than 100.
MOST_UNPACKED, MOST_RATIO = 1 << 30, 100


class DataError(ValueError):
    """A file cannot be read, or holds something else than what is needed; one line that names the file."""


def check_ratio(path: Path, unpacked: int, packed: int) -> None:
    """DataError where so many packed bytes claim to hold so many that they may be a decompression bomb."""
    if unpacked > MOST_UNPACKED and unpacked > MOST_RATIO * packed:
        raise DataError(
            f"{path}: {packed} packed bytes claim to hold {unpacked}, which may be a decompression bomb; unpack it "
            "first if it is none"
        )
