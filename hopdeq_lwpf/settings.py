"""Named settings: the YAML files of the folders solvers/, models/ and sweeps/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

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


def find(kind: str, name: str) -> dict[str, Any]:
    """The settings `kind`/`name`.yaml as a dict; an unknown name is an error that names the nearest."""
    if name not in names(kind):
        # Here, not at the top: _types needs torch, which the command line does without.
        from hopdeq_lwpf._types import unknown

        raise unknown(f"settings in {kind}/", name, names(kind))
    path = _folder(kind) / f"{name}.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} must hold a mapping of names to values, got {type(settings).__name__}")
    return settings
