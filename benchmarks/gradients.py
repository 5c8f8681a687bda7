"""Forward and backward together: milliseconds beside the error of the gradient, ours and torchdeq's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchdeq import get_deq

from benchmarks.problems import PROBLEMS
from benchmarks.timing import interleaved
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.solvers import Implicit, Termination, fixed_point

Gradient = Callable[[], Tensor]
LIMIT = 600


def _loss(state: Tensor, target: Tensor) -> Tensor:
    return (state * target).sum()


def _ours(
    f: Retrieval, query: Tensor, patterns: Tensor, target: Tensor, rtol: float, adjoint: Implicit
) -> Tensor:
    x = f.prepare(query, patterns)
    state = fixed_point(f, x, f.init(x), stop=Termination(rtol=rtol, max_steps=LIMIT), adjoint=adjoint).value
    return torch.autograd.grad(_loss(state, target), patterns)[0]


def _theirs(f: Retrieval, query: Tensor, patterns: Tensor, target: Tensor, options: dict[str, object],
            solver: dict[str, object]) -> Tensor:  # fmt: skip
    x = f.prepare(query, patterns)
    deq = get_deq(ift=True, f_max_iter=LIMIT, b_max_iter=LIMIT, **options)
    states, _ = deq(lambda z: f(z, x), f.init(x), solver_kwargs=solver)
    return torch.autograd.grad(_loss(states[-1], target), patterns)[0]


def _peers(tolerances: tuple[float, ...]) -> dict[str, tuple[dict[str, object], dict[str, object]]]:
    """torchdeq's forward and backward solvers at relative tolerances; its default too."""
    made: dict[str, tuple[dict[str, object], dict[str, object]]] = {
        "torchdeq default": ({"f_stop_mode": "abs"}, {})
    }
    for forward, extra in (("fixed_point_iter", {}), ("anderson", {"lam": 1e-10}), ("broyden", {})):
        for backward in ("broyden", "fixed_point_iter"):
            for tolerance in tolerances:
                options: dict[str, object] = {
                    "f_solver": forward, "b_solver": backward, "f_stop_mode": "rel", "b_stop_mode": "rel",
                    "f_tol": tolerance, "b_tol": max(tolerance, 1e-5),
                }  # fmt: skip
                made[f"torchdeq {forward} + {backward} {tolerance:g}"] = (options, dict(extra))
    return made


def run(name: str = "het", dtype: torch.dtype = torch.float32) -> list[dict[str, object]]:
    """One row a method: milliseconds, and the gradient's error relative to float64 solved to 1e-12."""
    problem = PROBLEMS[name]()
    f = Retrieval(problem.beta, forgetting=problem.forgetting)
    generator = torch.Generator().manual_seed(7)
    target = torch.randn(problem.query.shape, generator=generator, dtype=torch.float64)
    exact = _ours(
        f,
        problem.query,
        problem.patterns.clone().requires_grad_(),
        target,
        1e-13,
        Implicit(rtol=1e-13, max_steps=500),
    )
    query, target = problem.query.to(dtype), target.to(dtype)
    patterns = problem.patterns.to(dtype).requires_grad_()
    calls: dict[str, Gradient] = {}
    for tolerance in (1e-4, 1e-5, 1e-6):
        for rtol in (1e-3, 1e-6):
            label = f"ours {tolerance:g}, adjoint {rtol:g}"
            calls[label] = partial(_ours, f, query, patterns, target, tolerance, Implicit(rtol=rtol))
    for label, (options, solver) in _peers((1e-4, 1e-5, 1e-6)).items():
        calls[label] = partial(_theirs, f, query, patterns, target, options, solver)
    rows: list[dict[str, object]] = []
    for label, call in list(calls.items()):
        try:
            gradient = call().double()
        except (RuntimeError, torch.linalg.LinAlgError):
            del calls[label]
            continue
        rows.append(
            {"problem": name, "method": label, "error": float((gradient - exact).norm() / exact.norm())}
        )
    times = interleaved(dict(calls), rounds=7, warmup=1)
    return [{**row, "ms": round(times[str(row["method"])], 1)} for row in rows]


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
        exact = _ours(f, problem.query, patterns, target, 1e-14, Implicit(rtol=1e-14, max_steps=500))
        for scale in (1.0, 1e-6):
            found = _ours(f, problem.query, patterns, scale * target, 1e-11, Implicit()) / scale
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
            _loss(solve(Implicit("gmres", rtol=1e-13, max_steps=500)).value, target), patterns
        )[0]
        calls, solutions = {}, {}
        for method in ("auto", "cg", "minres", "gmres"):
            for rtol in (1e-3, 1e-6):
                solution = solve(Implicit(method, rtol=rtol))
                loss = _loss(solution.value, target)
                calls[f"{method} {rtol:g}"] = partial(torch.autograd.grad, loss, patterns, retain_graph=True)
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
