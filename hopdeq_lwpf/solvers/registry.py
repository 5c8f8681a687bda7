"""Solvers by name, and the choice that "auto" makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from hopdeq_lwpf._types import identity, unknown
from hopdeq_lwpf.imports import class_at
from hopdeq_lwpf.solvers.anderson import Anderson
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.broyden import Broyden
from hopdeq_lwpf.solvers.lbfgs import LBFGS
from hopdeq_lwpf.solvers.picard import Picard
from hopdeq_lwpf.solvers.torchdeq import PREFIX, THEIRS, TorchDEQ
from hopdeq_lwpf.solvers.view import FlatFunction

SOLVERS: dict[str, Callable[[], Solver]] = {
    "picard": Picard,
    "anderson": Anderson,
    "broyden": Broyden,
    "lbfgs": LBFGS,
}


def register_solver(name: str, factory: Callable[[], Solver]) -> None:
    """Make `solver=name` mean `factory()`; a name that is taken is an error."""
    if not isinstance(name, str) or not callable(factory):
        raise TypeError(
            f"register_solver needs a name and a factory such as a class, got {name!r}, {factory!r}"
        )
    if name.startswith(PREFIX):
        raise ValueError(f"solver {name!r}: names that begin with {PREFIX!r} are torchdeq's; choose another")
    if name in SOLVERS or name == "auto":
        raise ValueError(f"solver {name!r} is already registered")
    SOLVERS[name] = factory


def make_solver(spec: str | Solver) -> Solver | None:
    """The solver for a name or an object; None for "auto", which needs to see the function.

    "torchdeq:NAME" is torchdeq's solver of that name with its own defaults, `TorchDEQ(NAME)`.
    """
    if isinstance(spec, str):
        if spec == "auto":
            return None
        if spec.startswith(PREFIX):
            return cast(Solver, TorchDEQ(spec.removeprefix(PREFIX)))
        factory = SOLVERS[spec] if spec in SOLVERS else class_at("solver", spec)
        if factory is None:
            raise unknown("solver", spec, [*SOLVERS, "auto", *(PREFIX + name for name in THEIRS)])
        return cast(Solver, factory())
    proposes = callable(getattr(spec, "propose", None)) or callable(getattr(spec, "run", None))
    if isinstance(spec, type) or not proposes:
        raise TypeError(f"solver must be a name or an object such as LBFGS(memory=3), got {spec!r}")
    return spec


def choose_solver(f: FlatFunction, z0: Tensor) -> Solver:
    """What "auto" means for this function.

    Energy and symmetric Jacobian (retrieval): guarded L-BFGS, which keeps the basin of plain iteration.
    Energy in another metric (hierarchical memories): Picard, since no accelerated solver has been shown to
    keep its basin there. No energy: Picard, and Anderson only where it is slow.
    """
    if f.has_energy:
        return LBFGS() if f.metric(z0) is identity else Picard()
    return Anderson(memory=5, warmup=4, patience=15)
