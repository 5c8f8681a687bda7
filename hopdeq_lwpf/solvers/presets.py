"""Solvers, adjoints and stopping rules from named settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hopdeq_lwpf.options import construct
from hopdeq_lwpf.settings import find
from hopdeq_lwpf.solvers.adjoints import ADJOINTS, Adjoint
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.registry import SOLVERS
from hopdeq_lwpf.solvers.termination import Termination

STOPS = {"termination": Termination}


def build(settings: str | Mapping[str, Any]) -> Solver | Adjoint | Termination:
    """What the settings of this name in solvers/ describe; a mapping has one of the keys below and options.

    `solver: lbfgs`, `adjoint: implicit` or `stop: termination`. Unknown names and options are errors.
    """
    options = dict(find("solvers", settings) if isinstance(settings, str) else settings)
    kinds: dict[str, Mapping[str, Callable[..., Any]]] = {
        "solver": SOLVERS,
        "adjoint": ADJOINTS,
        "stop": STOPS,
    }
    given = [kind for kind in kinds if kind in options]
    # An Implicit adjoint has an option called `solver`.
    kind = "adjoint" if "adjoint" in given else given[0] if given else "solver"
    built: Solver | Adjoint | Termination = construct(kind, options, kinds[kind])
    return built
