"""What the command line says, made ready for the parser. Imports no torch."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.documents import Document, parse_document, parse_value, read_document

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
    try:
        return (parse_document(config, "--config") if _is_text(config) else read_document(config)).values
    except (OSError, SpecError):
        return None


def documents_of(arguments: Sequence[str]) -> list[Document]:
    """The settings files behind --config, in their order; SpecError for one that is not fit to be read.

    What --config has as text is looked at, too, but is no file and not in the list; nor is a file that is not there,
    which the parser says.
    """
    found = []
    words = list(arguments)
    for place, word in enumerate(words):
        option, equal, value = word.partition("=")
        if option == "--config" and (equal or place + 1 < len(words)):
            value = value if equal else words[place + 1]
            if _is_text(value):
                parse_document(value, "--config")
            elif Path(value).is_file():
                found.append(read_document(value))
    return found


def _is_text(config: str) -> bool:
    return "\n" in config or config.lstrip().startswith("{")


def flagged(arguments: Sequence[str], flags: Collection[str]) -> tuple[list[str], frozenset[str]]:
    """The arguments without the flags, --NAME with dashes or underscores, and the names of those that were given."""
    names = {f"--{flag}".replace("_", "-"): flag for flag in flags}
    found = frozenset(names[word.replace("_", "-")] for word in arguments if word.replace("_", "-") in names)
    return [word for word in arguments if word.replace("_", "-") not in names], found


def assigned_keys(arguments: Sequence[str], option: str = "set") -> list[str]:
    """The KEYs of --set KEY=VALUE and --set.KEY VALUE, in their order."""
    found = []
    for word, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equal, value = word.partition("=")
        key = name.removeprefix(f"--{option}.") if name.startswith(f"--{option}.") else ""
        if name == f"--{option}":
            text = value if equal else after
            key = "" if isinstance(parse_value(text), dict) else text.partition("=")[0]
        found += [key.strip()] if key.strip() else []
    return found


def assigned(arguments: Sequence[str], option: str = "set") -> list[str]:
    """The arguments with every `--set KEY=VALUE`, `--set.KEY VALUE` and `--set {KEY: VALUE}` in one mapping.

    It begins with the mapping `set` of the settings files; a key that is given anew moves to its end, where it wins
    over what the file says of the same. VALUE is YAML. Of a key of three parts and more the first two name the entry,
    in which the others are entered. Raises SpecError for --set without KEY=VALUE.
    """
    mapping: dict[str, Any] = {}
    rest: list[str] = []
    given = False
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equal, value = word.partition("=")
        if name == "--config" and (equal or words):
            value = value if equal else words.pop(0)
            rest += ["--config", value]
            own = (settings_of(value) or {}).get(option)
            mapping = {**own, **(mapping if given else {})} if isinstance(own, dict) else mapping
            continue
        if name != f"--{option}" and not name.startswith(f"--{option}."):
            rest.append(word)
            continue
        given = True
        key = name.removeprefix(f"--{option}").removeprefix(".")
        if not equal:
            if not words:
                raise SpecError(f"{word} needs KEY=VALUE behind it")
            value = words.pop(0)
        if not key:
            found = parse_value(value)
            if isinstance(found, dict):
                mapping = {str(inner): entry for inner, entry in found.items()}
                continue
            key, equal, value = value.partition("=")
            if not equal or not key.strip():
                raise SpecError(f"--{option} needs KEY=VALUE or a mapping, got {key!r}")
        _assign(mapping, key.strip(), _value(value))
    return [*rest, f"--{option}", _flow(mapping)] if given else rest


def _assign(mapping: dict[str, Any], key: str, value: Any) -> None:
    """Enter the value at the end of the mapping: at KEY, or of a.b.c.d in the mapping at "a.b"."""
    parts = key.split(".")
    if len(parts) <= 2:
        mapping.pop(key, None)
        mapping[key] = value
        return
    name, outer = ".".join(parts[:2]), mapping.get(parts[0])
    before = mapping.pop(name, outer.get(parts[1]) if isinstance(outer, dict) else None)
    place = mapping[name] = copy.deepcopy(before) if isinstance(before, dict) else {}
    for step in parts[2:-1]:
        inner = place.get(step)
        place[step] = place = dict(inner) if isinstance(inner, dict) else {}
    place[parts[-1]] = value


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
    value = parse_value(text)
    return text if value is None and not text.strip() else value


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
        words += [f"--{name}", _flow(mapping)]
    return words


def _flow(mapping: dict[str, Any]) -> str:
    """A mapping as one line of YAML."""
    return yaml.safe_dump(mapping, default_flow_style=True, sort_keys=False, width=float("inf")).strip()
