"""Docstrings of this package are plain prose with `name: meaning` lines; this turns them into reStructuredText.

Three things are done to each: runs of `name: meaning` become definition lists, indented blocks become literal
ones, and what reStructuredText would take for markup (*batch, |z|, names_) is escaped. `names` in backticks
become links where they are public.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from public_names import HOMES
from sphinx.application import Sphinx

NAME = r"[A-Za-z_][\w.]*"
# A name, or several with commas, as it stands before a colon; it may be in backticks.
TERM = re.compile(rf"(?:(?<=^)|(?<=[.;)] ))(`?{NAME}`?(?:(?:, | and |/)`?{NAME}`?)*)(?: \([^()]*\))?: (?=\S)")
QUOTED = re.compile(r"`([^`]+)`")
BULLET = re.compile(r"^([-*]|\d+\.) ")


def names_of(thing: Any) -> set[str]:
    """Arguments, fields and attributes that a docstring of this thing may explain."""
    found: set[str] = set()
    if inspect.isclass(thing):
        found |= {name for name in dir(thing) if not name.startswith("_")}
        for base in thing.__mro__:
            found |= set(getattr(base, "__annotations__", {}))
        if dataclasses.is_dataclass(thing):
            found |= {field.name for field in dataclasses.fields(thing)}
    with contextlib.suppress(TypeError, ValueError):
        found |= set(inspect.signature(thing).parameters)
    return found


def escape(text: str) -> str:
    """Prose as reStructuredText: backticks become code or links, the rest loses its power as markup."""
    parts: list[str] = []
    end = 0
    for match in QUOTED.finditer(text):
        parts += [_plain(text[end : match.start()]), _code(match[1], text[match.end() : match.end() + 1])]
        end = match.end()
    return "".join([*parts, _plain(text[end:])])


def _plain(text: str) -> str:
    return re.sub(r"([\\*|`_])", r"\\\1", text)


def _code(text: str, after: str) -> str:
    # Inline markup must be followed by a space or punctuation.
    glue = "\\ " if after and (after.isalnum() or after == "_") else ""
    first, _, rest = text.removesuffix("()").partition(".")
    if first in HOMES and re.fullmatch(r"\w*", rest):
        target = f"{HOMES[first]}.{rest}" if rest else HOMES[first]
        return f":py:obj:`{text} <{target}>`{glue}"
    return f"``{text}``{glue}"


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines without a blank one between them."""
    run: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            run.append(line.rstrip())
        elif run:
            yield run
            run = []


def entries(text: str, known: set[str]) -> list[tuple[str, str]]:
    """The text cut at its `name: ` marks: (term or "", meaning); only names that the object has are terms."""
    cuts = []
    for match in TERM.finditer(text):
        names = re.split(r", | and |/", match[1].replace("`", ""))
        if all(name.split(".")[0] in known for name in names):
            cuts.append((match.start(), match.end(), text[match.start() : match.end() - 2]))
    result = [("", _ended(text[: cuts[0][0] if cuts else len(text)].strip()))]
    for i, (_, end, term) in enumerate(cuts):
        stop = cuts[i + 1][0] if i + 1 < len(cuts) else len(text)
        result.append((term, _ended(text[end:stop].strip())))
    return [entry for entry in result if entry != ("", "")]


def _ended(text: str) -> str:
    """A meaning that went on to the next name with a semicolon ends with a full stop."""
    return text.removesuffix(";") + "." if text.endswith(";") else text


def chunks(run: list[str]) -> Iterator[str]:
    """A paragraph cut where an indented meaning ends: what stands at the margin again is prose of its own."""
    chunk: list[str] = []
    hanging = False
    for line in run:
        indented = line.startswith(" ")
        if hanging and not indented:
            yield " ".join(chunk)
            chunk = []
        chunk.append(line.strip())
        hanging = indented
    yield " ".join(chunk)


def render(lines: list[str], known: set[str]) -> list[str]:
    """A docstring, already without its common indentation, as reStructuredText."""
    out: list[str] = []
    in_list = False
    for run in paragraphs(lines):
        indented = all(line.startswith("    ") for line in run)
        if indented and not in_list:
            out += [".. code-block:: text", "", *("   " + line for line in run), ""]
        elif BULLET.match(run[0].strip()):
            out += [*_bullets(run), ""]
        elif indented:  # a second paragraph of the last meaning
            out += ["    " + escape(" ".join(line.strip() for line in run)), ""]
        else:
            pieces = [piece for text in chunks(run) for piece in entries(text, known)]
            for term, meaning in pieces:
                out += [_term(term), "    " + escape(meaning), ""] if term else [escape(meaning), ""]
            in_list = bool(pieces and pieces[-1][0])
    return out


def _term(term: str) -> str:
    names, _, shape = term.partition(" (")
    code = ", ".join(f"``{name.replace('`', '')}``" for name in re.split(r", | and |/", names))
    return code + (escape(f" ({shape}") if shape else "")


def _bullets(run: list[str]) -> list[str]:
    out: list[str] = []
    for line in run:
        text = line.strip()
        mark = BULLET.match(text)
        if mark:
            out.append(f"{mark[0]}{escape(text[mark.end() :])}")
        else:
            out.append(" " * 2 + escape(text))
    return out


def process(
    app: Sphinx, what: str, name: str, thing: Any, options: dict[str, bool], lines: list[str]
) -> None:
    """Sphinx's hook: changes `lines` in place."""
    lines[:] = render(lines, names_of(thing))


def skip(
    app: Sphinx, what: str, name: str, thing: Any, default: bool, options: dict[str, bool]
) -> bool | None:
    """Leaves out what nobody calls, and fields of named tuples, whose docstrings Python made."""
    made = str(getattr(thing, "__doc__", "") or "").startswith("Alias for field number")
    return True if made or name == "extra_repr" else None


def sign(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Protocols and abstract bases have a signature that says nothing."""
    says_nothing = what == "class" and re.fullmatch(
        r"\(\*args(: Any)?, \*\*kwargs(: Any)?\)", arguments or ""
    )
    return ("", None) if says_nothing else None


def setup(app: Sphinx) -> dict[str, Callable[..., Any] | bool]:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
