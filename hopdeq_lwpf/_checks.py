"""Checks of settings classes: one line that names the setting, its value and what is allowed. No torch."""

from __future__ import annotations

import copy
import difflib
import functools
import math
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import field
from typing import Any, Union, get_args, get_origin, get_type_hints


class SpecError(ValueError):
    """A setting has a value that makes no sense; one line that names the setting and what is allowed."""


def option(default: Any, text: str) -> Any:
    """A field of a settings class with its default and its help; dicts and lists are copied for each object."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def forms(settings: Any, free: Collection[str] = ()) -> None:
    """SpecError where a field is one value, a list or a mapping and should be another of these, or should be text.

    What numbers are allowed is said by other checks. free: fields that take several forms.
    """
    for name, hint in _hints(type(settings)).items():
        value = getattr(settings, name)
        if name not in free and not _has_form(value, hint):
            raise SpecError(f"{name} must be {_form(hint)}, got {value!r}")


_hints: Callable[[type], dict[str, Any]] = functools.cache(get_type_hints)


def _has_form(value: object, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_has_form(value, one) for one in inner)
    if kind in (tuple, list):
        return isinstance(value, (tuple, list)) and all(_has_form(entry, inner[0]) for entry in value)
    if kind is dict:
        return isinstance(value, Mapping)
    if kind is str:
        return isinstance(value, str)
    return kind is Any or not isinstance(value, (tuple, list, Mapping))


def _form(hint: Any) -> str:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_form(one) for one in inner))
    if kind in (tuple, list):
        return f"a list, each entry {_form(inner[0])}"
    names = {dict: "a mapping", str: "text", type(None): "null"}
    return names.get(kind, "one value")


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """' Did you mean ...?' with the nearest allowed name, or nothing where none is near."""
    near = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SpecError(f"{name} must be a finite number, got {value!r}")
    if value <= above or value < least or value > most:
        limits = [f"above {above:g}"] * (above > -math.inf) + [f"at least {least:g}"] * (least > -math.inf)
        limits += [f"at most {most:g}"] * (most < math.inf)
        raise SpecError(f"{name} must be {' and '.join(limits)}, got {value!r}")


def whole(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"{name} must be a whole number of at least {least}, got {value!r}")


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(f"{name} {value!r} is not one of {list(allowed)}{did_you_mean(value, allowed)}")


def tolerances(rtol: float, atol: float) -> None:
    number("rtol", rtol, least=0)
    number("atol", atol, least=0)
    if not rtol + atol > 0:
        raise SpecError("rtol and atol are both 0: no solve would ever count as converged")
