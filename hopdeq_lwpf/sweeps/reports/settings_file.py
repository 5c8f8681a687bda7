"""settings.yaml: what a run leaves in its folder, so that the folder can be reported and gone on with. No torch."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from hopdeq_lwpf._checks import SpecError, did_you_mean
from hopdeq_lwpf.documents import read_document
from hopdeq_lwpf.sweeps.engine.storage_url import without_password
from hopdeq_lwpf.sweeps.study_spec import StudySpec
from hopdeq_lwpf.sweeps.sweep_spec import SweepSpec

NAME = "settings.yaml"
REPORT = "report.html"
# A key that only settings of this kind have.
KINDS: dict[str, tuple[type, str]] = {
    "grid": (SweepSpec, "sweep"),
    "adjoint": (StudySpec, "compare --config"),
}


class Spec(Protocol):
    """Settings of a sweep or of a study."""

    @property
    def out(self) -> str: ...

    def as_dict(self) -> dict[str, Any]: ...


def leave_settings(spec: Spec) -> Path:
    """Write OUT/settings.yaml; returns its path. A run does so once it has the folder for itself.

    OSError where it cannot be written.
    """
    path = Path(spec.out) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{NAME}.{os.getpid()}")
    try:
        temporary.write_text(settings_text(spec), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def settings_text(spec: Spec) -> str:
    """The settings as a YAML file that `hopdeq-lwpf` takes."""
    values = public(spec)
    (command,) = (name for key, (_, name) in KINDS.items() if key in values)
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    return f"# hopdeq-lwpf {command} {Path(spec.out) / NAME}\n{text}"


def public(spec: Spec) -> dict[str, Any]:
    """Every setting, without the password in the URL of a database, which .pgpass or PGPASSWORD may hold instead."""
    values = spec.as_dict()
    if isinstance(values.get("storage"), str):
        values["storage"] = without_password(values["storage"])
    return values


def read_settings(folder: str, file: str | None = None) -> SweepSpec | StudySpec:
    """The settings of the sweep or study in a folder, with that folder as `out`.

    Those of `file` where one is named, else of the folder's settings.yaml, else those that its report.html holds.
    Raises SpecError where there are none, or where they are of something that has no trials.
    """
    if not Path(folder).is_dir():
        raise SpecError(f"study {folder!r} is no folder; name the folder of a sweep, its setting `out`")
    path = Path(file) if file is not None else Path(folder) / NAME
    if file is None and not path.exists():
        return _spec({**_embedded(Path(folder)), "out": folder}, str(Path(folder) / REPORT), {})
    document = read_document(path)
    lines = {where[0]: line for where, line in document.lines.items() if len(where) == 1}
    return _spec({**document.values, "out": folder}, document.source, lines)


def _spec(values: dict[str, Any], source: str, lines: Mapping[str, int]) -> SweepSpec | StudySpec:
    for key, (kind, _) in KINDS.items():
        if key in values:
            known = [entry.name for entry in dataclasses.fields(kind)]
            for name in values:
                if name not in known:
                    line = f":{lines[name]}" if name in lines else ""
                    raise SpecError(f"{source}{line}: unknown key {name!r}{did_you_mean(name, known)}")
            found: SweepSpec | StudySpec = kind(**values)
            return found
    raise SpecError(
        f"{source}: holds no settings of a sweep (key grid) or of a study (key adjoint); the report of a comparison of "
        "retrieval is written when it ends, and needs its recalls"
    )


def _embedded(folder: Path) -> dict[str, Any]:
    """The settings that a report holds for programs."""
    path = folder / REPORT
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = re.search(r'<script type="application/json" id="settings">(.*?)</script>', text, re.DOTALL)
    if not found:
        raise SpecError(
            f"{folder}: holds neither {NAME} nor a {REPORT} with settings; name their file: --settings FILE"
        )
    settings: dict[str, Any] = json.loads(found[1])
    return settings
