"""Solvers, stopping rule, adjoints, fixed_point() and Equilibrium; they know no model."""

from hopdeq_lwpf._types import identity
from hopdeq_lwpf.solvers.adjoints import Adjoint, EqProp, Implicit, Neumann, OneStep, Phantom, Unrolled
from hopdeq_lwpf.solvers.anderson import Anderson
from hopdeq_lwpf.solvers.base import Iterate, Solver
from hopdeq_lwpf.solvers.broyden import Broyden
from hopdeq_lwpf.solvers.equilibrium import Equilibrium
from hopdeq_lwpf.solvers.lbfgs import LBFGS
from hopdeq_lwpf.solvers.penalty import jacobian_penalty
from hopdeq_lwpf.solvers.picard import Picard
from hopdeq_lwpf.solvers.presets import build
from hopdeq_lwpf.solvers.registry import SOLVERS, register_solver
from hopdeq_lwpf.solvers.solve import fixed_point
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.solvers.torchdeq import TorchDEQ
from hopdeq_lwpf.solvers.torchdeq_registry import Bound, register_with_torchdeq
from hopdeq_lwpf.solvers.warm import WarmStart
from hopdeq_lwpf.solvers.weights import frozen_weights

__all__ = [
    "Adjoint",
    "Anderson",
    "Bound",
    "EqProp",
    "Broyden",
    "Equilibrium",
    "Implicit",
    "Iterate",
    "LBFGS",
    "Neumann",
    "OneStep",
    "Phantom",
    "Picard",
    "SOLVERS",
    "Solver",
    "Termination",
    "TorchDEQ",
    "Unrolled",
    "WarmStart",
    "build",
    "fixed_point",
    "frozen_weights",
    "identity",
    "jacobian_penalty",
    "register_solver",
    "register_with_torchdeq",
]
