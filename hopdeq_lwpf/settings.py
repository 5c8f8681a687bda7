"""Named settings: the YAML files of the folders solvers/, models/ and sweeps/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hopdeq_lwpf.documents import read_document

KINDS = ("models", "solvers", "sweeps")
_PACKAGE = Path(__file__).resolve().parent


def _folder(kind: str) -> Path:
    """The folder in a checkout, or the copy inside an installed package."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {list(KINDS)}")
    packaged = _PACKAGE / "presets" / kind
    return packaged if packaged.is_dir() else _PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """The settings there are of one kind ("models", "solvers", "sweeps"), sorted."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def path_of(kind: str, name: str) -> Path:
    """Where the settings `kind`/`name`.yaml are; the file need not exist."""
    return _folder(kind) / f"{name}.yaml"


def find(kind: str, name: str) -> dict[str, Any]:
    """The settings `kind`/`name`.yaml as a dict; an unknown name is an error that names the nearest."""
    if name not in names(kind):
        # Here, not at the top: _types needs torch, which the command line does without.
        from hopdeq_lwpf._types import unknown

        raise unknown(f"settings in {kind}/", name, names(kind))
    return read_document(path_of(kind, name)).values
