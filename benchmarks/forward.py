"""Time of the forward solve: ours as a user calls it, torchdeq's stopped by an oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.basins import SOLVERS, reference
from benchmarks.peers import PEERS, measure, residual
from benchmarks.problems import PROBLEMS
from benchmarks.timing import interleaved
from hopdeq_lwpf._types import Solution
from hopdeq_lwpf.diagnostics import basin_changed
from hopdeq_lwpf.retrieval import Retrieval, RetrievalContext
from hopdeq_lwpf.solvers import Solver, Termination, fixed_point

CASES = ((torch.float32, 1e-4), (torch.float32, 1e-5), (torch.float64, 1e-6))
LIMIT = 2000


def _solve(
    f: Retrieval, x: RetrievalContext, z0: Tensor, solver: str | Solver, stop: Termination
) -> Solution:
    with torch.no_grad():
        return fixed_point(f, x, z0, solver=solver, stop=stop)


def _row(name: str, state: Tensor, end: Solution, worst: Tensor, tolerance: float) -> dict[str, object]:
    return {
        "solver": name,
        "worst": float(worst.nan_to_num(1e9).max()),
        "unconverged": int((~(worst <= tolerance)).sum()),
        "changed": int(basin_changed(state, end).sum()),
    }


def run(names: tuple[str, ...] = tuple(PROBLEMS)) -> list[dict[str, object]]:
    """One row a problem, precision, tolerance and solver; milliseconds are medians of interleaved runs."""
    rows: list[dict[str, object]] = []
    for name in names:
        problem = PROBLEMS[name]()
        end = reference(problem)
        for dtype, tolerance in CASES:
            f, x, z0 = problem.build(dtype)
            g = partial(f.forward, x=x)
            stop = Termination(rtol=tolerance, max_steps=LIMIT)
            calls: dict[str, Callable[[], object]] = {}
            found: list[dict[str, object]] = []
            for peer in PEERS:
                ran = measure(peer, g, z0, tolerance)
                if ran is None:
                    continue
                if not ran.unconverged:
                    calls[peer] = ran.call(g, z0)
                row = _row(peer, ran.state, end, residual(g, ran.state), tolerance)
                found.append({**row, "steps": ran.iterations, "evaluations": ran.iterations})
            for own, solver in SOLVERS.items():
                calls[own] = partial(_solve, f, x, z0, solver, stop)
                solution = _solve(f, x, z0, solver, stop)
                row = _row(own, solution.state, end, residual(g, solution.state), 1.1 * tolerance)
                found.append(
                    {
                        **row,
                        "steps": int(solution.steps.max()),
                        "evaluations": round(float(solution.evaluations.double().mean()), 1),
                    }
                )
            times = interleaved(calls, rounds=7)
            head = {"problem": name, "dtype": str(dtype).removeprefix("torch."), "tolerance": tolerance}
            # A peer that does not converge all queries has no time to compare.
            taken = {solver: round(ms, 2) for solver, ms in times.items()}
            rows += [{**head, **row, "ms": taken.get(str(row["solver"]))} for row in found]
    return rows


def overhead() -> list[dict[str, object]]:
    """Time of a solve on its way over that of as many evaluations of f in a bare loop, less 1.

    The steps are fewer than the solver needs: no query is dropped and no step is lost in rounding.
    """
    f, x, z0 = PROBLEMS["span"]().build()
    rows: list[dict[str, object]] = []
    for name, steps in (("picard", 60), ("auto", 16), ("anderson", 12), ("broyden", 12)):
        stop = Termination(rtol=0.0, atol=0.0, max_steps=steps)

        def evaluations(steps: int = steps) -> None:
            z = z0
            with torch.no_grad():
                for _ in range(steps + 1):
                    z = f(z, x)

        calls = {"f": evaluations, name: partial(_solve, f, x, z0, SOLVERS[name], stop)}
        times = interleaved(calls, rounds=41)
        rows.append(
            {
                "solver": name,
                "steps": steps,
                "ms": round(times[name], 2),
                "ms of f alone": round(times["f"], 2),
                "overhead": round(times[name] / times["f"] - 1, 3),
            }
        )
    return rows
