"""Tensors with a description in one safetensors file. Reading it runs no code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hopdeq_lwpf.data.errors import DataError
from hopdeq_lwpf.data.files import replacing

# One entry of the header, since safetensors writes several in an order that changes from run to run.
ENTRY = "hopdeq_lwpf"
# safetensors reads no header of more than 100 MB; the rest is for the names and shapes of the tensors.
MAX_DESCRIPTION = 90_000_000


@dataclass(frozen=True)
class Kind:
    """What a file holds. `version` is raised when older code could no longer read new files."""

    name: str
    version: int
    reader: str  # the call that reads such a file, for messages


def write_tensors(
    path: str | os.PathLike[str], kind: Kind, tensors: Mapping[str, Tensor], description: dict[str, Any]
) -> None:
    """Write tensors, without gradient, and a description that JSON can hold; `path` may have any suffix.

    What stood at `path` stays whole until the new file is. The same content gives the same bytes.
    Raises DataError where the folder is missing or cannot be written, ValueError for a description of more
    than 90 MB, which could not be read back.
    """
    from safetensors.torch import save_file

    target = Path(path)
    if not target.parent.is_dir():
        raise DataError(f"{target}: the folder {target.parent} does not exist")
    if target.is_dir():
        raise DataError(f"{target}: is a folder")
    text = json.dumps({"kind": kind.name, "version": kind.version, "description": description})
    # JSON in JSON: each quotation mark and backslash gains one more backslash.
    size = len(text) + text.count('"') + text.count("\\")
    if size > MAX_DESCRIPTION:
        raise ValueError(
            f"the labels or names to be saved in {target} take {size} bytes, and the header of the file holds at "
            f"most {MAX_DESCRIPTION}; use shorter labels, whole numbers for instance"
        )
    ready = _unshared({name: tensor.detach() for name, tensor in tensors.items()})
    try:
        with replacing(target) as temporary:
            save_file(ready, temporary, metadata={ENTRY: text})
            with temporary.open(
                "rb"
            ) as file:  # before the renaming, so that a power cut leaves one whole file
                os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{target}: {error.strerror or 'cannot be written'}") from error


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and contiguous; copies where two share memory, which safetensors refuses."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        flat = tensor.cpu().contiguous()
        where = flat.untyped_storage().data_ptr()
        ready[name] = flat.clone() if where in seen else flat
        seen.add(where)
    return ready


def read_tensors(
    path: str | os.PathLike[str], kind: Kind, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a file of this kind.

    On the CPU the tensors are private maps of the file: nothing is copied until it is read, and writing to them
    changes no file. Raises DataError, one line, for a file that is missing, cut off, damaged, of another kind,
    or written by a newer version in a format that this one does not know.
    """
    from safetensors import SafetensorError, safe_open

    target = Path(path)
    if target.is_dir():
        raise DataError(f"{target}: is a folder, needs a file")
    try:
        # Opened here first: safetensors has messages of its own for what the system says.
        with target.open("rb"):
            pass
        with safe_open(target, framework="pt", device="cpu") as file:
            description = _description(target, kind, file.metadata() or {})
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        detail = (str(error).splitlines() or [""])[0]
        raise DataError(f"{target}: is damaged, cut off, or no safetensors file ({detail})") from error
    except OSError as error:
        raise DataError(f"{target}: {error.strerror or 'cannot be read'}") from error
    return tensors, description


def _description(path: Path, kind: Kind, header: Mapping[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(header[ENTRY])
        found, version, description = about["kind"], about["version"], about["description"]
    except KeyError as error:
        raise DataError(
            f"{path}: is a safetensors file, but not of hopdeq_lwpf (its header has no {error.args[0]!r})"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: has a damaged header ({error})") from error
    if found != kind.name:
        raise DataError(f"{path}: holds a {found}, not a {kind.name}; {kind.reader} reads a {kind.name}")
    if not isinstance(version, int) or not isinstance(description, dict):
        raise DataError(f"{path}: has a damaged header (version {version!r})")
    if version > kind.version:
        raise DataError(
            f"{path}: has format {version}, and this hopdeq_lwpf reads a {kind.name} up to format {kind.version}: "
            "upgrade hopdeq_lwpf"
        )
    return description
