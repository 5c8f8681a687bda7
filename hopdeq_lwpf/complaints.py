"""What the command line says about a mistake: one line, with the nearest name and the place in the settings file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from hopdeq_lwpf.documents import Document


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is most like it; None where none is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return near[0] if near else None


def located(message: str, documents: Sequence[Document], given: Sequence[str]) -> str:
    """The message behind FILE:LINE: of what it is about, where a settings file has that.

    What the command line gives as well is not looked for: it wins over the file.
    """
    if message.startswith("--"):  # of the command line itself
        return message
    said = {
        word.partition("=")[0].removeprefix("--").partition(".")[0] for word in given if word.startswith("--")
    }
    for document in reversed(documents):
        place = document.place_of(message)
        if place and place[0] not in said and not message.startswith(f"{document.source}:"):
            return f"{document.source}:{document.lines[place]}: {message}"
    return message


def explained(
    message: str, commands: Iterable[str], options: Sequence[str], others: Mapping[str, str]
) -> str:
    """The parser's objection in one line, with the nearest name that would have been right.

    options: all that the given command has. others: those that only another kind of it has, with what to say about
    them.
    """
    # The wording differs between the releases of the parser since 4.40.
    found = re.search(r"[Uu]nrecognized arguments: (.*)", message)
    if found:
        return _unknown_option((found[1].split() or [""])[0], options, others)
    found = re.search(r"does not accept (?:option|nested key) '([^']*)'", message)
    if found:
        if found[1] in others:
            return f"{found[1]!r} {others[found[1]]}"
        # Of a mapping under an unknown key the parser names the first key inside: 'gird.radius'.
        top = found[1].partition(".")[0]
        near = nearest(top, options)
        said = f"unknown key {(top if near else found[1])!r} in the settings"
        return said + (f"; did you mean {near!r}?" if near else "")
    found = re.search(r"invalid choice: '([^']*)'", message)
    if found or 'expected "command"' in message:
        near = nearest(found[1], commands) if found else None
        hint = f"; did you mean {near!r}?" if near else f"; it must be one of {', '.join(commands)}"
        return (f"unknown command {found[1]!r}" if found else "a command is missing") + hint
    if "does not support item assignment" in message or "object is not iterable" in message:
        return "a setting that takes several values got one in the settings file: write it as a list, [VALUE]"
    message = message.replace("Parser key ", "").replace("Problems parsing config: ", "settings file: ")
    return re.sub(r"<class '(\w+)'>", r"\1", message)


def _unknown_option(wrong: str, options: Sequence[str], others: Mapping[str, str]) -> str:
    plain = wrong.lstrip("-").split("=")[0].split(".")[0].replace("-", "_")
    near = nearest(plain, [*(option.replace("-", "_") for option in options), "print_config", "help"])
    near = next((option for option in options if option.replace("-", "_") == near), near)
    if plain in others:
        return f"{wrong!r} {others[plain]}" + (f"; or did you mean '--{near}'?" if near else "")
    return f"unknown option {wrong!r}" + (
        f"; did you mean '--{near}'?" if near else "; see hopdeq-lwpf --help"
    )
