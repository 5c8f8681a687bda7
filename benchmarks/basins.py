"""Which memory is recalled: the share of queries that end where plain iteration in float64 ends."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.problems import RetrievalProblem, regimes
from hopdeq_lwpf.data import Preprocessing, load_digits
from hopdeq_lwpf.solvers import LBFGS, Anderson, Broyden, Picard, Solver, Termination, fixed_point

SOLVERS: dict[str, str | Solver] = {
    "auto": "auto",
    "picard": Picard(),
    "lbfgs, no guard": LBFGS(guard=False),
    "anderson": Anderson(),
    "broyden": Broyden(),
}
SAME = 0.05  # relative distance to the float64 limit within which it is the same attractor


def limit(problem: RetrievalProblem) -> Tensor:
    """Where plain iteration in float64 ends: (B, d)."""
    f, x, z0 = problem.build(torch.float64)
    stop = Termination(rtol=1e-11, atol=1e-13, max_steps=30_000)
    with torch.no_grad():
        solution = fixed_point(f, x, z0, solver="picard", stop=stop)
    return solution.require().state


def changed(state: Tensor, end: Tensor) -> Tensor:
    """Which queries ended elsewhere, (B,) bool."""
    return (state.double() - end).norm(dim=-1) > SAME * end.norm(dim=-1).clamp_min(1e-9)


def digits(beta: float, queries: int = 256) -> RetrievalProblem:
    """The handwritten digits as stored patterns, queries with Gaussian noise of .2 a pixel."""
    images, _ = load_digits()
    generator = torch.Generator().manual_seed(0)
    which = torch.randperm(len(images), generator=generator)[:queries]
    noisy = images[which] + 0.2 * torch.randn(queries, images.shape[1], generator=generator)
    prepare = Preprocessing.fit(images, "center-unit")
    return RetrievalProblem(f"digits, beta {beta:g}", prepare(images).double(), prepare(noisy).double(), beta)


def run() -> list[dict[str, object]]:
    """One row a regime and solver."""
    problems = regimes()
    for beta in (8.0, 16.0, 32.0):
        problems[f"digits, beta {beta:g}"] = digits(beta)
    rows: list[dict[str, object]] = []
    for name, problem in problems.items():
        end = limit(problem)
        f, x, z0 = problem.build()
        for solver_name, solver in SOLVERS.items():
            with torch.no_grad():
                solution = fixed_point(f, x, z0, solver=solver, stop=Termination(max_steps=1000))
            rows.append(
                {
                    "regime": name,
                    "solver": solver_name,
                    "queries": len(z0),
                    "changed": int(changed(solution.state, end).sum()),
                    "unconverged": int((~solution.converged).sum()),
                    "evaluations": round(float(solution.evaluations.double().mean()), 1),
                }
            )
    return rows
