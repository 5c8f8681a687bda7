"""A table of fixed-point problems with a known root and a known rate, and the exact gradient of each.

The rate is the spectral radius of the Jacobian at the root. Everything is float64 and made from one seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hopdeq_lwpf import Solution, Termination, fixed_point
from hopdeq_lwpf.forgetting import PFU, ReLU
from hopdeq_lwpf.models import Retrieval

F64 = torch.float64
TIGHT = Termination(rtol=1e-13, atol=1e-15, max_steps=3000)
SOLVERS = ("picard", "anderson", "broyden", "lbfgs", "auto")


class Map:
    """f(z, x) from a function of z and the parts of x."""

    def __init__(self, function: Callable[..., Any], state_ndim: int | None = None) -> None:
        self.function = function
        if state_ndim is not None:
            self.state_ndim = state_ndim

    def __call__(self, z, x):
        return self.function(z, *x)


class Scaled:
    """Linear, with a Jacobian A that is self-adjoint in the metric diag(m): m A is symmetric, A is not."""

    has_energy = True

    def __init__(self, m: Tensor) -> None:
        self.m = m

    def __call__(self, z, x):
        s, b = x
        return (z @ s + b) / self.m

    def energy(self, z, x):
        s, b = x
        return (0.5 * self.m * z * z - 0.5 * z * (z @ s) - z * b).sum(-1)

    def metric(self, z, x):
        return lambda v: v * self.m


@dataclass(frozen=True)
class Problem:
    """z = f(z, prepare(*arguments)); gradients are taken to the arguments."""

    f: Callable[..., Any]
    arguments: tuple[Tensor, ...]
    z0: Any
    root: Any
    rate: float
    prepare: Callable[..., Any] = lambda *arguments: arguments
    symmetric: bool = False  # f declares a metric


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers, always the same ones."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n: int, seed: int = 2) -> Tensor:
    """(n, n) orthogonal."""
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def affine() -> Problem:
    b = normal(3, 4)
    return Problem(Map(lambda z, b: 0.5 * z + b), (b,), torch.zeros(3, 4, dtype=F64), 2 * b, 0.5)


def tanh() -> Problem:
    # All entries of the root are +-c, so that the Jacobian there is (1 - c^2) W with W orthogonal times 0.9.
    c, w = 0.5, 0.9 * orthogonal(4)
    root = c * normal(3, 4).sign()
    b = torch.atanh(root) - root @ w.T
    f = Map(lambda z, w, b: torch.tanh(z @ w.T + b))
    return Problem(f, (w, b), torch.zeros_like(b), root, 0.9 * (1 - c * c))


def cosine() -> Problem:
    root = torch.full((3, 1), 0.7390851332151607, dtype=F64)
    f = Map(lambda z, a: torch.cos(a * z))
    return Problem(f, (torch.ones(3, 1, dtype=F64),), torch.ones(3, 1, dtype=F64), root, 0.673612029183214)


def triangular() -> Problem:
    a = torch.tensor([[0.9, 0.7, -0.4], [0.0, 0.5, 0.6], [0.0, 0.0, -0.3]], dtype=F64)
    b = normal(4, 3)
    root = torch.linalg.solve(torch.eye(3, dtype=F64) - a, b.T).T
    return Problem(Map(lambda z, a, b: z @ a.T + b), (a, b), torch.zeros_like(b), root, 0.9)


def scaled() -> Problem:
    m = torch.tensor([1.0, 2.0, 6.0], dtype=F64)
    q = orthogonal(3)
    half = m.sqrt().diag()
    s = half @ q @ torch.tensor([0.9, 0.5, 0.1], dtype=F64).diag() @ q.T @ half
    root = normal(4, 3)
    b = root * m - root @ s
    return Problem(Scaled(m), (s, b), torch.zeros_like(b), root, 0.9, symmetric=True)


def uniform_memory() -> Problem:
    # Patterns +-s e_i: at z = 0 all weights are 1 / 2d and the Jacobian is beta s^2 / d times the identity.
    patterns = torch.cat([torch.eye(4, dtype=F64), -torch.eye(4, dtype=F64)])
    f = Retrieval(3.2)
    z0 = 0.3 * normal(3, 4)
    return Problem(
        f, (patterns,), z0, torch.zeros(3, 4, dtype=F64), 0.8, lambda p: f.prepare(z0, p), symmetric=True
    )


def injected(unit: object, limit: float, beta: float) -> Problem:
    # The query is chosen so that the root is what it is said to be. limit: scores up to it are forgotten and
    # become it. Jacobian beta X^T K (diag p - p p^T) K X with K = diag(kept).
    root, patterns = 0.7 * normal(3, 4, seed=5), 0.6 * normal(6, 4, seed=6)
    scores = beta * root @ patterns.T
    kept = (scores > limit).to(F64)
    p = torch.softmax(scores.clamp_min(limit), -1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    j = beta * patterns.T @ (kept[:, :, None] * inner * kept[:, None, :]) @ patterns
    query = root - (kept * p) @ patterns
    f = Retrieval(beta, forgetting=unit, inject="input")
    z0 = root + 0.01 * normal(3, 4, seed=7)
    rate = float(torch.linalg.eigvalsh(j).max())
    return Problem(f, (query, patterns), z0, root, rate, f.prepare, symmetric=True)


def dictionary() -> Problem:
    u, v = normal(3, 2), normal(3, 1, 2, seed=3)

    def f(z, a, b):
        return {"u": 0.6 * z["v"][:, 0] + a, "v": 0.6 * z["u"][:, None] + b}

    # u = .6 v + a, v = .6 u + b: eigenvalues +-.6.
    a, b = u - 0.6 * v[:, 0], v - 0.6 * u[:, None]
    z0 = {"u": torch.zeros_like(u), "v": torch.zeros_like(v)}
    return Problem(Map(f), (a, b), z0, {"u": u, "v": v}, 0.6)


def pair() -> Problem:
    # u' = .8 u, v' = u^2 + .3 v, each plus a constant: eigenvalues .8 and .3, Jacobian not symmetric.
    u, v = normal(4, 2), normal(4, 2, seed=4)
    f = Map(lambda z, a, b: (0.8 * z[0] + a, z[0] ** 2 + 0.3 * z[1] + b))
    z0 = (torch.zeros_like(u), torch.zeros_like(v))
    return Problem(f, (0.2 * u, 0.7 * v - u * u), z0, (u, v), 0.8)


def matrix_state() -> Problem:
    # z -> L z R with eigenvalues of L times those of R.
    q, r = orthogonal(3), orthogonal(2, seed=8)
    left = q @ torch.tensor([0.9, 0.4, -0.2], dtype=F64).diag() @ q.T
    right = r @ torch.tensor([0.9, 0.5], dtype=F64).diag() @ r.T
    root = normal(2, 3, 2)
    c = root - left @ root @ right
    f = Map(lambda z, left, c: left @ z @ right + c, state_ndim=2)
    return Problem(f, (left, c), torch.zeros_like(c), root, 0.81)


def batch_of_two_dimensions() -> Problem:
    root, w = normal(2, 3, 3), 0.7 * orthogonal(3)
    b = root - root @ w.T
    f = Map(lambda z, w, b: z @ w.T + b, state_ndim=1)
    return Problem(f, (w, b), torch.zeros_like(b), root, 0.7)


PROBLEMS: dict[str, Problem] = {
    "affine": affine(),
    "tanh": tanh(),
    "cos": cosine(),
    "triangular": triangular(),
    "metric": scaled(),
    "uniform memory": uniform_memory(),
    "softmax retrieval": injected(None, -torch.inf, 0.9),
    "relu retrieval": injected(ReLU(), 0.0, 1.0),
    "pfu retrieval": injected(PFU(0.1), 0.1, 1.1),
    "dict": dictionary(),
    "tuple": pair(),
    "state of two dims": matrix_state(),
    "batch of two dims": batch_of_two_dimensions(),
}


def fresh(problem: Problem) -> tuple[Tensor, ...]:
    """The arguments as leaves that require grad."""
    return tuple(a.clone().requires_grad_() for a in problem.arguments)


def solve(problem: Problem, arguments: tuple[Tensor, ...] | None = None, **options: Any) -> Solution:
    """fixed_point on the problem, to rounding unless told otherwise."""
    x = problem.prepare(*(problem.arguments if arguments is None else arguments))
    return fixed_point(problem.f, x, problem.z0, **{"stop": TIGHT, **options})


def flat(state: Any) -> Tensor:
    """All numbers of a state in one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(state)])


def loss_of(state: Any) -> Tensor:
    """A loss with another gradient in every entry."""
    z = flat(state)
    return (z * torch.linspace(-1, 2, z.numel(), dtype=z.dtype)).sum() + 0.5 * (z * z).sum()


def jacobian(problem: Problem) -> Tensor:
    """Dense df/dz at the root, over the whole batch."""
    x = problem.prepare(*problem.arguments)
    leaves, spec = pytree.tree_flatten(problem.root)
    sizes = [leaf.numel() for leaf in leaves]

    def apply(z: Tensor) -> Tensor:
        parts = [p.reshape(leaf.shape) for p, leaf in zip(z.split(sizes), leaves, strict=True)]
        return flat(problem.f(pytree.tree_unflatten(parts, spec), x))

    return torch.autograd.functional.jacobian(apply, flat(problem.root))


def exact_gradients(problem: Problem, scale: float = 1.0) -> tuple[Tensor, ...]:
    """d loss / d arguments by a dense solve at the known root."""
    arguments = fresh(problem)
    z = pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), problem.root)
    g = flat(torch.autograd.grad(scale * loss_of(z), pytree.tree_leaves(z)))
    system = torch.eye(g.numel(), dtype=F64) - jacobian(problem)
    u = torch.linalg.solve(system.T, g)
    image = flat(problem.f(problem.root, problem.prepare(*arguments)))
    return torch.autograd.grad(image, arguments, u)


def relative_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """|actual - expected| / |expected|, over all tensors together."""
    a, e = flat(list(actual)), flat(list(expected))
    return float((a - e).norm() / e.norm())
