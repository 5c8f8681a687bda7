"""Models: fixed-point functions with everything around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hopdeq_lwpf.forgetting import UNITS, Forgetting
from hopdeq_lwpf.options import construct
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.settings import find

__all__ = ["Retrieval", "build"]

MODELS = {"retrieval": Retrieval}


def build(settings: str | Mapping[str, Any]) -> Retrieval:
    """A model from the settings of this name in models/, or from a mapping with a key `model`.

    `forgetting` may be a name, or a mapping {unit: name, ...options}. Unknown names and options are errors.
    """
    options = dict(find("models", settings) if isinstance(settings, str) else settings)
    unit = options.get("forgetting")
    if isinstance(unit, Mapping):
        built: Forgetting = construct("unit", unit, UNITS)
        options["forgetting"] = built
    model: Retrieval = construct("model", options, MODELS)
    return model
