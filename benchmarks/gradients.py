"""The gradient in float64, and the adjoint solvers alone; forward and backward together are rows of the suite."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.problems import PROBLEMS
from benchmarks.timing import interleaved
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.solvers import Implicit, Termination, fixed_point

LIMIT = 600


def loss(state: Tensor, target: Tensor) -> Tensor:
    """A scalar whose gradient is the target."""
    return (state * target).sum()


def target_of(like: Tensor) -> Tensor:
    """Fixed random numbers in the shape and dtype of `like`: the gradient of the loss."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return drawn.to(like)


def solved_gradient(
    f: Retrieval, query: Tensor, patterns: Tensor, target: Tensor, rtol: float, adjoint: Implicit
) -> Tensor:
    """The gradient with respect to the patterns, (N, d), of a solve to rtol."""
    x = f.prepare(query, patterns)
    state = fixed_point(f, x, f.init(x), stop=Termination(rtol=rtol, max_steps=LIMIT), adjoint=adjoint).value
    return torch.autograd.grad(loss(state, target), patterns)[0]


def precision() -> list[dict[str, object]]:
    """float64: error against the exact gradient with the defaults of the adjoint, at two scales of the loss."""
    rows: list[dict[str, object]] = []
    for name in ("het", "span", "pfu"):
        problem = PROBLEMS[name]()
        f = Retrieval(problem.beta, forgetting=problem.forgetting)
        target = torch.randn(
            problem.query.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
        )
        patterns = problem.patterns.clone().requires_grad_()
        exact = solved_gradient(
            f, problem.query, patterns, target, 1e-14, Implicit(rtol=1e-14, max_steps=500)
        )
        for scale in (1.0, 1e-6):
            found = solved_gradient(f, problem.query, patterns, scale * target, 1e-11, Implicit()) / scale
            rows.append(
                {"problem": name, "scale": scale, "error": float((found - exact).norm() / exact.norm())}
            )
    return rows


def _saddles(f: Retrieval, query: Tensor, patterns: Tensor) -> Tensor:
    """Starts that Broyden takes to an unstable equilibrium of f."""
    x = f.prepare(query, patterns)
    solution = fixed_point(f, x, f.init(x), solver="broyden", stop=Termination(rtol=1e-10, max_steps=LIMIT))
    states = solution.value
    x = f.prepare(states, patterns)
    rate = torch.stack([torch.linalg.eigvalsh(_jacobian(f, z, patterns)).max() for z in states])
    return states[solution.converged & (rate > 1.05)]


def _jacobian(f: Retrieval, z: Tensor, patterns: Tensor) -> Tensor:
    weights = torch.softmax(float(f.beta) * patterns @ z, 0)
    mean = weights @ patterns
    return float(f.beta) * (patterns.T @ (weights[:, None] * patterns) - mean[:, None] * mean)


def adjoint_solvers() -> list[dict[str, object]]:
    """The adjoint solve alone: milliseconds, products a query and error of the gradient, float64.

    At the stable equilibria of span, and at saddles, where CG meets negative curvature.
    """
    rows: list[dict[str, object]] = []
    for name in ("span", "saddles"):
        problem = PROBLEMS["span" if name == "span" else "random"]()
        f = Retrieval(problem.beta)
        start = problem.query if name == "span" else _saddles(f, problem.query, problem.patterns)
        target = torch.randn(start.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        patterns = problem.patterns.clone().requires_grad_()
        stop = Termination(rtol=1e-12, max_steps=LIMIT)
        solver = "auto" if name == "span" else "broyden"

        def solve(adjoint: Implicit, f=f, start=start, patterns=patterns, stop=stop, solver=solver):  # noqa: ANN001, ANN202
            x = f.prepare(start, patterns)
            return fixed_point(f, x, f.init(x), stop=stop, solver=solver, adjoint=adjoint)

        exact = torch.autograd.grad(
            loss(solve(Implicit("gmres", rtol=1e-13, max_steps=500)).value, target), patterns
        )[0]
        calls, solutions = {}, {}
        for method in ("auto", "cg", "minres", "gmres"):
            for rtol in (1e-3, 1e-6):
                solution = solve(Implicit(method, rtol=rtol))
                scalar = loss(solution.value, target)
                calls[f"{method} {rtol:g}"] = partial(
                    torch.autograd.grad, scalar, patterns, retain_graph=True
                )
                solutions[f"{method} {rtol:g}"] = solution
        errors = {key: float((call()[0] - exact).norm() / exact.norm()) for key, call in calls.items()}
        times = interleaved(dict(calls), rounds=7, warmup=1)
        rows += [
            {
                "problem": name, "method": key, "queries": len(start), "error": errors[key],
                "products": round(float(solutions[key].adjoint.steps.double().mean()), 1),
                "unconverged": int((solutions[key].adjoint.result != 0).sum()),
                "ms": round(times[key], 2),
            }
            for key in calls
        ]  # fmt: skip
    return rows
