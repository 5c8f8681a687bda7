"""Separation functions by name."""

from __future__ import annotations

from hopdeq_lwpf._types import resolve
from hopdeq_lwpf.separation.base import Separation
from hopdeq_lwpf.separation.entmax import Entmax, Entmax15, Sparsemax
from hopdeq_lwpf.separation.kernels import LSR, Polynomial
from hopdeq_lwpf.separation.softmax import HardMax, Softmax, Softmax1

# Each with its defaults; one instance serves every model that asks for the name.
SEPARATIONS: dict[str, Separation] = {
    "softmax": Softmax(),
    "sparsemax": Sparsemax(),
    "entmax15": Entmax15(),
    "entmax": Entmax(),
    "softmax1": Softmax1(),
    "hardmax": HardMax(),
    "polynomial": Polynomial(),
    "lsr": LSR(),
}


def register_separation(name: str, separation: Separation) -> None:
    """Make a separation function known under a name; models that use the name share the instance.

    Raises TypeError for anything but an instance of `Separation`, ValueError for a name that is taken.
    """
    if not isinstance(name, str) or not isinstance(separation, Separation):
        raise TypeError(
            f"register_separation needs a name and a Separation instance, got {name!r}, {separation!r}"
        )
    if name in SEPARATIONS:
        raise ValueError(f"separation {name!r} is taken by {SEPARATIONS[name]!r}; choose another name")
    SEPARATIONS[name] = separation


def make_separation(spec: str | Separation) -> Separation:
    """The separation function of this name, or the one that is given.

    Raises ValueError for a name that is not known, TypeError for anything else.
    """
    made: Separation = resolve("separation", spec, SEPARATIONS, Separation)
    return made
