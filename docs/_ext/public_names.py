"""The public names, the page of each, and a check that the reference has them all."""

from __future__ import annotations

import importlib
import types
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

# In this order: a name that two of them export is documented where it comes last.
MODULES = (
    "hopdeq_lwpf",
    "hopdeq_lwpf.models",
    "hopdeq_lwpf.models.sdm",
    "hopdeq_lwpf.models.diffusion",
    "hopdeq_lwpf.solvers",
    "hopdeq_lwpf.diagnostics",
    "hopdeq_lwpf.forgetting",
    "hopdeq_lwpf.separation",
    "hopdeq_lwpf.normalization",
    "hopdeq_lwpf.graphs",
    "hopdeq_lwpf.streaming",
    "hopdeq_lwpf.memory",
    "hopdeq_lwpf.data",
    "hopdeq_lwpf.training",
    "hopdeq_lwpf.plots",
)

# Documented too: what public functions return, raise and take.
ALSO = {
    "AdjointReport": "hopdeq_lwpf._types.AdjointReport",
    "ConvergenceWarning": "hopdeq_lwpf._types.ConvergenceWarning",
    "FixedPointFunction": "hopdeq_lwpf._types.FixedPointFunction",
    "Recall": "hopdeq_lwpf.recall.Recall",
    "Trace": "hopdeq_lwpf._types.Trace",
    "save_solution": "hopdeq_lwpf.storage.save_solution",
}


def public(module: str) -> list[str]:
    """The names that this module makes public: `__all__`, else what `dir` says and is of this package."""
    home = importlib.import_module(module)
    listed = getattr(home, "__all__", None)
    names = [name for name in (listed or dir(home)) if not name.startswith("_")]
    return [name for name in names if listed or _ours(getattr(home, name, None), module)]


def _ours(thing: Any, module: str) -> bool:
    if isinstance(thing, types.ModuleType):
        return False
    return str(getattr(thing, "__module__", "")).startswith(module)


def homes() -> dict[str, str]:
    """Where each public function and class is documented: path by name, path by path where two have one name."""
    where: dict[int, tuple[str, str]] = {}
    for module in MODULES:
        for name in public(module):
            thing = getattr(importlib.import_module(module), name)
            if callable(thing):  # constants are explained in the text of their page
                where[id(thing)] = (name, f"{module}.{name}")
    names = [name for name, _ in where.values()]
    return {name if names.count(name) == 1 else path: path for name, path in where.values()} | ALSO


HOMES = homes()
logger = logging.getLogger(__name__)


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of every public function and class that the reference leaves out."""
    described = env.get_domain("py").objects
    for path in sorted(HOMES.values()):
        if path not in described:
            logger.warning("%s is public, but no page of docs/api has it", path)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
