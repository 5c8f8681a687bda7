"""Modern Hopfield networks with partial forgetting as fixed-point functions."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hopdeq_lwpf import diagnostics as diagnostics
    from hopdeq_lwpf import forgetting as forgetting
    from hopdeq_lwpf import models as models
    from hopdeq_lwpf import solvers as solvers
    from hopdeq_lwpf._types import ConvergenceError as ConvergenceError
    from hopdeq_lwpf._types import ConvergenceWarning as ConvergenceWarning
    from hopdeq_lwpf._types import Result as Result
    from hopdeq_lwpf._types import Solution as Solution
    from hopdeq_lwpf.memory import Memory as Memory
    from hopdeq_lwpf.models.conversion import convert_attention as convert_attention
    from hopdeq_lwpf.recall import retrieve as retrieve
    from hopdeq_lwpf.settings import find as find
    from hopdeq_lwpf.solvers import Equilibrium as Equilibrium
    from hopdeq_lwpf.solvers import Termination as Termination
    from hopdeq_lwpf.solvers import fixed_point as fixed_point
    from hopdeq_lwpf.storage import load_solution as load_solution
    from hopdeq_lwpf.streaming.files import open_patterns as open_patterns

# Where each public name lives. They are looked up when first used: the command line needs the version at
# once and torch only when there is work to do.
_HOME = {
    "ConvergenceError": "_types",
    "ConvergenceWarning": "_types",
    "Equilibrium": "solvers",
    "Memory": "memory",
    "Result": "_types",
    "Solution": "_types",
    "Termination": "solvers",
    "convert_attention": "models.conversion",
    "find": "settings",
    "fixed_point": "solvers",
    "load_solution": "storage",
    "open_patterns": "streaming.files",
    "retrieve": "recall",
}
_MODULES = ("diagnostics", "forgetting", "models", "solvers")

__all__ = [*_HOME, *_MODULES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
