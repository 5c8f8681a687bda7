"""What the command line says, made ready for the parser. Imports no torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_DEEP = re.compile(r"--(\w+\.\w+)((?:\.\w+)*)(?:=(.*))?", re.DOTALL)


def together(arguments: Sequence[str]) -> list[str]:
    """The arguments with all that they say of one mapping in one option, `--units.pfu '{threshold: 0.5, noise: 0.1}'`.

    The parser merges mappings one level deep: of --units.pfu.threshold and --units.pfu.noise, or of one of them and
    a mapping in a settings file, only the last would be left.
    """
    files: dict[str, dict[str, Any]] = {}  # mappings of the settings files so far, by "units.pfu"
    found: dict[str, dict[str, Any]] = {}  # those that options build on them
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        option, equal, value = word.partition("=")
        if option == "--config" and (equal or words):
            value = value if equal else words.pop(0)
            rest += [*_options(found), "--config", value]
            files.update(_mappings(value))
            found.clear()
            continue
        match = _DEEP.fullmatch(word)
        if match is None or not (match[3] is not None or words):
            rest.append(word)
            continue
        value = match[3] if match[3] is not None else words.pop(0)
        if not _enter(found, files, match[1], match[2], value):
            rest += [f"--{match[1]}", value]
    return [*rest, *_options(found)]


def settings_of(config: str) -> dict[str, Any] | None:
    """A settings file or its text as a mapping; None where it is none, which the parser says better."""
    is_text = "\n" in config or config.lstrip().startswith("{")
    try:
        content = yaml.safe_load(config if is_text else Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _enter(
    found: dict[str, dict[str, Any]], files: dict[str, dict[str, Any]], name: str, path: str, text: str
) -> bool:
    """Enter `text` at NAME.PATH, or as the mapping NAME itself; False where it is no mapping and the parser's."""
    value = _value(text)
    *steps, last = path.split(".")[1:] or [""]
    if not last:
        found.pop(name, None)
        if isinstance(value, dict):
            found[name] = value
        else:
            files.pop(name, None)
        return isinstance(value, dict)
    place = found.setdefault(name, copy.deepcopy(files.get(name, {})))
    for step in steps:
        inner = place.get(step)
        place[step] = place = dict(inner) if isinstance(inner, dict) else {}
    place[last] = value
    return True


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    try:
        return float(value) if isinstance(value, str) else value  # 1e-4, which YAML 1.1 takes for a word
    except ValueError:
        return value


def _mappings(config: str) -> dict[str, dict[str, Any]]:
    """The mappings at the second level of settings, by "units.pfu"."""
    content = settings_of(config) or {}
    return {
        f"{name}.{key}": value
        for name, inner in content.items()
        if isinstance(inner, dict)
        for key, value in inner.items()
        if isinstance(value, dict)
    }


def _options(found: dict[str, dict[str, Any]]) -> list[str]:
    words = []
    for name, mapping in found.items():
        words += [
            f"--{name}",
            yaml.safe_dump(mapping, default_flow_style=True, sort_keys=False, width=float("inf")).strip(),
        ]
    return words
