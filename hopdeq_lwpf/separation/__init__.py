"""Separation functions: the gradient p of a memory Lagrangian L(s), over the last dimension.

Every L here is symmetric and non-decreasing, and L or exp(L) is convex. So the retrieval update with p is a
step of the concave-convex procedure on the energy |z|^2/2 - L(beta X z)/beta (for `LSR`: of mean shift on
-L/beta), with partial forgetting too where the unit says so (Ota et al. 2023, eq. 24-28).
"""

from hopdeq_lwpf.separation.base import Separation
from hopdeq_lwpf.separation.entmax import Entmax, Entmax15, Sparsemax
from hopdeq_lwpf.separation.kernels import LSR, Polynomial
from hopdeq_lwpf.separation.registry import SEPARATIONS, make_separation, register_separation
from hopdeq_lwpf.separation.softmax import HardMax, Softmax, Softmax1

__all__ = [
    "LSR",
    "SEPARATIONS",
    "Entmax",
    "Entmax15",
    "HardMax",
    "Polynomial",
    "Separation",
    "Softmax",
    "Softmax1",
    "Sparsemax",
    "make_separation",
    "register_separation",
]
