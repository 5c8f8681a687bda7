"""Which memory is recalled: the share of queries that end where plain iteration in float64 ends."""

from __future__ import annotations

import torch

from benchmarks.problems import RetrievalProblem, regimes
from hopdeq_lwpf import Solution
from hopdeq_lwpf.data import Preprocessing, load_digits
from hopdeq_lwpf.diagnostics import basin_changed, picard_limit
from hopdeq_lwpf.solvers import LBFGS, Anderson, Broyden, Picard, Solver, Termination, fixed_point

SOLVERS: dict[str, str | Solver] = {
    "auto": "auto",
    "picard": Picard(),
    "lbfgs, no guard": LBFGS(guard=False),
    "anderson": Anderson(),
    "broyden": Broyden(),
}
# Near enough to the end of plain iteration to tell it from any other attractor.
EXACT = Termination(rtol=1e-11, atol=1e-13, max_steps=30_000)


def reference(problem: RetrievalProblem) -> Solution:
    """Where plain iteration in float64 ends; every query gets there."""
    limit = picard_limit(*problem.build(torch.float64), stop=EXACT)
    limit.require()
    return limit


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
        end = reference(problem)
        f, x, z0 = problem.build()
        for solver_name, solver in SOLVERS.items():
            with torch.no_grad():
                solution = fixed_point(f, x, z0, solver=solver, stop=Termination(max_steps=1000))
            rows.append(
                {
                    "regime": name,
                    "solver": solver_name,
                    "queries": len(z0),
                    "changed": int(basin_changed(solution.state, end).sum()),
                    "unconverged": int((~solution.converged).sum()),
                    "evaluations": round(float(solution.evaluations.double().mean()), 1),
                }
            )
    return rows
