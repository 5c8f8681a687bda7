"""YAML files of settings, read so that a mistake is one line with the file and the line. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hopdeq_lwpf._checks import SpecError

STANDARD = tuple(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")
)
MOST = 100_000  # values in a file; a few lines of aliases to aliases can stand for billions
Path_ = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-4 is a number and 2020-01-31 text."""


# A date would be an object that no setting takes; the parser of the command line has it as text, too.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:timestamp"]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


@dataclass(frozen=True)
class Document:
    """A mapping from YAML and the line of each of its keys and list items, by path ("grid", "speed", "fast")."""

    source: str
    values: dict[str, Any]
    lines: Mapping[Path_, int]

    def place_of(self, message: str) -> Path_:
        """The path that a complaint such as "grid.speed: 'epoch' is no setting" is about; () where none is.

        The first word is looked up as a place, whose inner keys may hold dots themselves, and within it, else
        anywhere, the first name in quotes.
        """
        found = re.match(r"(?:cell '[^']*': )?\"?([\w.\[\]-]+)", message)
        place = self._resolve(found[1]) if found else ()
        # "model: option of model 'ham': 'dampin' is not one of": the one that is wrong, or what it is the value of.
        wrong = re.search(r"(?:(\w+) )?'([^']+)' (?:is|has|names|stands)\b", message)
        first = re.search(r"'([^']+)'", message[found.end(1) :] if found else message)
        names = [*(wrong.group(2, 1) if wrong else ()), first and first[1]]
        for name, within in [*((name, place) for name in names), (found and found[1], ())]:
            inner = self._named(name, within) if name and (within or not place) else None
            if inner is not None:
                return inner
        return place or (self._resolve(first[1]) if first else ())

    def _resolve(self, dotted: str) -> Path_:
        """The longest path that the words between dots and brackets name from the top."""
        rest = re.sub(r"\[(\d+)\]", r".\1", dotted)
        path: Path_ = ()
        while rest:
            below = {key[-1]: key for key in self.lines if len(key) == len(path) + 1 and key[:-1] == path}
            fits = [name for name in below if rest == name or rest.startswith(f"{name}.")]
            if not fits:
                break
            name = max(fits, key=len)
            path, rest = below[name], rest[len(name) + 1 :]
        return path

    def _named(self, name: str, within: Path_) -> Path_ | None:
        for path in self.lines:
            inside = path[: len(within)] == within and len(path) > len(within)
            if inside and (path[-1] == name or path[-1].endswith(f".{name}")):
                return path
        return None


def read_document(path: str | os.PathLike[str]) -> Document:
    """The mapping of names to values in a YAML file.

    SpecError, one line that begins FILE:LINE:, for what is not UTF-8 or no YAML, a tab where spaces must be, a key that
    stands twice in a mapping, a tag (`!!python/...`, `!anything`: refused, since some would run code), and for
    anything but a mapping. OSError where the file cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SpecError(f"{path}:{line}: is not UTF-8 text ({error.reason})") from error
    return parse_document(text, str(path))


def parse_document(text: str, source: str) -> Document:
    """`read_document` of a text; source: what stands where a message has the file."""
    loader = None
    try:
        loader = _Loader(text)  # which looks at the characters at once
        node = loader.get_single_node()
        if node is None:
            raise SpecError(f"{source}:1: is empty, needs a mapping of names to values")
        if not isinstance(node, yaml.MappingNode):
            raise _at(source, node, "needs a mapping of names to values (NAME: VALUE)")
        lines = dict(_lines(node, source, [0], ()))
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise SpecError(_syntax(error, source)) from error
    except (yaml.YAMLError, ValueError) as error:  # of a date or a character that does not exist
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{source}: {' '.join(str(error).split())}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return Document(source, {str(key): value for key, value in values.items()}, lines)


def parse_value(text: str) -> Any:
    """A plain value, list or mapping as YAML has it; what is no YAML is text."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError):
        return text


def _lines(node: yaml.Node, source: str, count: list[int], path: Path_) -> Iterator[tuple[Path_, int]]:
    """Every path below a node with its line; SpecError for what a settings file may not hold."""
    count[0] += 1
    if count[0] > MOST or len(path) > 50:  # an alias inside of what it stands for never ends
        raise _at(source, node, f"aliases (*name) make this more than {MOST} values, or endless")
    if node.tag not in STANDARD:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _at(source, node, f"the tag {tag} is refused: settings are plain values, lists and mappings")
    if isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            inner = (*path, str(number))
            yield inner, entry.start_mark.line + 1
            yield from _lines(entry, source, count, inner)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _at(source, key, "a name is a list or a mapping, needs to be plain")
            name, line = key.value, key.start_mark.line + 1
            if name in seen:
                raise _at(
                    source, key, f"the name {name!r} stands twice in one mapping, before in line {seen[name]}"
                )
            seen[name] = line
            yield (*path, name), line
            yield from _lines(value, source, count, (*path, name))


def _at(source: str, node: yaml.Node, what: str) -> SpecError:
    return SpecError(f"{source}:{node.start_mark.line + 1}: {what}")


def _syntax(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark is not None else ""
    if error.problem and r"'\t'" in error.problem:
        return f"{source}{line}: a tab: YAML is indented by spaces only"
    parts = [part for part in (error.context, error.problem) if part]
    return f"{source}{line}: is no YAML: {' '.join('; '.join(parts).split())}"
