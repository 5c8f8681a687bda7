"""Objects from named options, with an error that helps where a name is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hopdeq_lwpf._types import unknown


def construct(key: str, settings: Mapping[str, Any], factories: Mapping[str, Callable[..., Any]]) -> Any:
    """`factories[settings[key]]` called with the other settings; the caller's mapping stays as it is."""
    if key not in settings:
        raise ValueError(
            f"the settings need {key!r}, one of {sorted(factories)}; got the keys {sorted(settings)}"
        )
    name = settings[key]
    if name not in factories:
        raise unknown(key, name, factories)
    options = {option: value for option, value in settings.items() if option != key}
    allowed = inspect.signature(factories[name]).parameters
    for option in options:
        if option not in allowed:
            raise unknown(f"option of {key} {name!r}:", option, allowed)
    return factories[name](**options)
