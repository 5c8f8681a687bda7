"""Classes of the user's own in settings, as package.module:Class; refused unless importing was allowed.

A settings file that may import is code: whoever wrote it can run anything. So `hopdeq-lwpf ... --allow-import`, or the
variable HOPDEQ_LWPF_ALLOW_IMPORT=1, says that it may; it reaches the worker processes of a sweep with the environment.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hopdeq_lwpf._checks import SpecError

FLAG = "allow-import"
VARIABLE = "HOPDEQ_LWPF_ALLOW_IMPORT"
WHERE = ("model", "solver", "adjoint")  # keys whose values may name a class
_PATH = re.compile(r"(?!torchdeq:)[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")
# What objects of a solver and of an adjoint can do; a solver one of both.
_METHODS = {"solver": ("propose", "run"), "adjoint": ("solve",)}


def allow() -> None:
    """Let settings import, here and in processes that this one starts; modules of the working folder are found."""
    os.environ[VARIABLE] = "1"
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def paths(settings: Any) -> list[str]:
    """Every package.module:Class under a key of `WHERE`, or one that ends in it, at any depth."""
    found: list[str] = []
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            here = str(key).rpartition(".")[2] in WHERE
            entries = value if isinstance(value, (list, tuple)) else [value]  # of a grid
            for entry in entries:
                named = here and isinstance(entry, str) and _PATH.fullmatch(entry)
                found += [entry] if named else paths(entry)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            found += paths(value)
    return list(dict.fromkeys(found))


def class_at(key: str, name: object) -> Callable[..., Any] | None:
    """The class that `name` is the path of; None where it is no path, but a name that is looked up or not known.

    key: model (a torch.nn.Module), solver (with `propose` or `run`) or adjoint (with `solve`); None for others.
    Raises SpecError where importing was not allowed, where nothing is there, and for something of another kind.
    """
    if key not in WHERE or not isinstance(name, str):
        return None
    if not _PATH.fullmatch(name):
        if re.fullmatch(r"\w+(\.\w+)+", name):
            module, _, last = name.rpartition(".")
            raise SpecError(
                f"{key} {name!r} is no name; a class of your own is {module}:{last}, with --{FLAG}"
            )
        return None
    if os.environ.get(VARIABLE) != "1":
        raise SpecError(
            f"{key} {name!r} is code of your own, which is imported only with --{FLAG} (a settings file is code then); "
            f"the names that need none: hopdeq-lwpf list {'models' if key == 'model' else 'solvers'}"
        )
    module, _, last = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{key} {name!r} cannot be imported: {error}") from error
    if not isinstance(found, type) or not _fits(key, found):
        kind = "a torch.nn.Module" if key == "model" else f"a class with {' or '.join(_METHODS[key])}"
        raise SpecError(f"{key} {name!r} is not {kind}")
    return found


def _fits(key: str, found: type) -> bool:
    if key == "model":
        from torch import nn

        return issubclass(found, nn.Module)
    return any(callable(getattr(found, method, None)) for method in _METHODS[key])
