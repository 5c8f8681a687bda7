"""Solvers, stopping rule, adjoints, fixed_point() and Equilibrium; they know no model."""

from hopdeq_lwpf.solvers.adjoints import Adjoint, Implicit, Neumann, OneStep, Phantom, Unrolled
from hopdeq_lwpf.solvers.anderson import Anderson
from hopdeq_lwpf.solvers.base import Iterate, Solver
from hopdeq_lwpf.solvers.broyden import Broyden
from hopdeq_lwpf.solvers.equilibrium import Equilibrium
from hopdeq_lwpf.solvers.lbfgs import LBFGS
from hopdeq_lwpf.solvers.picard import Picard
from hopdeq_lwpf.solvers.presets import build
from hopdeq_lwpf.solvers.registry import SOLVERS, register_solver
from hopdeq_lwpf.solvers.solve import fixed_point
from hopdeq_lwpf.solvers.termination import Termination

__all__ = [
    "LBFGS",
    "SOLVERS",
    "Adjoint",
    "Anderson",
    "Broyden",
    "Equilibrium",
    "Implicit",
    "Iterate",
    "Neumann",
    "OneStep",
    "Phantom",
    "Picard",
    "Solver",
    "Termination",
    "Unrolled",
    "build",
    "fixed_point",
    "register_solver",
]
