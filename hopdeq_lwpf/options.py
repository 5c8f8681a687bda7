"""Objects from named options, with an error that helps where a name is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.imports import class_at


def construct(key: str, settings: Mapping[str, Any], factories: Mapping[str, Callable[..., Any]]) -> Any:
    """`factories[settings[key]]` called with the other settings; the caller's mapping stays as it is."""
    if key not in settings:
        raise ValueError(
            f"the settings need {key!r}, one of {sorted(factories)}; got the keys {sorted(settings)}"
        )
    name = settings[key]
    factory = factories[name] if name in factories else class_at(key, name)
    if factory is None:
        raise unknown(key, name, factories)
    options = {option: value for option, value in settings.items() if option != key}
    allowed = inspect.signature(factory).parameters
    for option in options:
        if option not in allowed:
            raise unknown(f"option of {key} {name!r}:", option, allowed)
    return factory(**options)
