"""Retrieval of many states on a graph: time and memory of a solve against the number of nodes, and of the operators."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.memory import Peak
from benchmarks.timing import interleaved
from hopdeq_lwpf import Termination
from hopdeq_lwpf.data import make_curve
from hopdeq_lwpf.graphs import KNN, Laplacian, heat_kernel, implicit_euler
from hopdeq_lwpf.models.diffusion import retrieve_on_graph
from hopdeq_lwpf.solvers import LBFGS, Picard

NEIGHBORS, LAM, ETA, BETA = 8, 10.0, 0.3, 8.0
NODES = (1000, 2000, 4000, 8000)


def run() -> list[dict[str, object]]:
    """One row a number of nodes, each in a process of its own, then one a size and operator, then solvers."""
    rows = [_in_own_process(nodes) for nodes in NODES]
    return rows + operators() + solvers()


def solve(nodes: int) -> dict[str, object]:
    """A solve of `nodes` queries on their sparse graph among as many patterns, and what it took above the start."""
    points = make_curve("fourier", stored=nodes, queries=nodes)
    graph = KNN(NEIGHBORS, sparse=True)
    few = points.query[:64]
    retrieve_on_graph(few, few, beta=BETA, lam=LAM, eta=ETA, graph=graph)  # what a first call loads
    with Peak() as peak:
        start = time.perf_counter()
        made = graph(points.query)
        middle = time.perf_counter()
        found = retrieve_on_graph(
            points.query, points.stored, beta=BETA, lam=LAM, eta=ETA, graph=graph, query_graph=made
        )
        seconds = time.perf_counter() - middle
    assert made.edge is not None
    return {
        "part": "solve, sparse", "nodes": nodes, "edges": made.edge.shape[1] // 2,
        "seconds of the graph": middle - start, "seconds": seconds, "evaluations": int(found.evaluations),
        "residual": float(found.residual), "converged": bool(found.converged),
        "MB above start": peak.above,
    }  # fmt: skip


def _in_own_process(nodes: int) -> dict[str, object]:
    """Memory that was freed may stay with a process, so that each size gets its own."""
    code = (
        "import json, sys, torch; from benchmarks.diffusion import solve; "
        f"torch.set_num_threads({torch.get_num_threads()}); print(json.dumps(solve({nodes})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    row: dict[str, object] = json.loads(done.stdout)
    return row


def _heat(laplacian: Laplacian, features: Tensor) -> Tensor:
    return heat_kernel(laplacian, 0.5)(features)


@torch.no_grad()
def operators() -> list[dict[str, object]]:
    """Making each operator and applying it to 64 columns, dense and sparse."""
    rows = []
    for nodes in (64, 256, 512, 1024, 2000):
        features = torch.randn(nodes, 64)
        kinds: dict[str, Callable[[], Tensor]] = {}
        for sparse in (False, True):
            laplacian = KNN(NEIGHBORS, sparse=sparse)(features).laplacian()
            form = "sparse" if sparse else "dense"
            resolvent = implicit_euler(laplacian, 1.0)
            kinds[f"heat kernel, made and applied, {form}"] = partial(_heat, laplacian, features)
            kinds[f"resolvent, applied, {form}"] = partial(resolvent, features)
        times = interleaved(kinds, rounds=5, warmup=1)
        rows += [{"part": name, "nodes": nodes, "ms": value} for name, value in times.items()]
    return rows


def solvers() -> list[dict[str, object]]:
    """Plain steps, the default, beside guarded L-BFGS: 128 problems of 24 queries and 48 patterns on curves."""
    noise = {"stored_noise": 0.7, "query_noise": 0.7}
    sets = [make_curve("rotated_digit", stored=48, queries=24, **noise, seed=seed) for seed in range(128)]
    query, stored = torch.stack([each.query for each in sets]), torch.stack([each.stored for each in sets])
    rows = []
    for forgetting in (None, "relu", "pfu"):
        options = {"beta": BETA, "lam": 1.0, "eta": ETA, "forgetting": forgetting}
        limit = retrieve_on_graph(
            query.double(),
            stored.double(),
            **options,
            solver=Picard(),
            stop=Termination(rtol=1e-10, max_steps=5000),
        )
        calls = {
            name: partial(retrieve_on_graph, query, stored, **options, solver=solver)
            for name, solver in {"picard": Picard(), "lbfgs": LBFGS()}.items()
        }
        times = interleaved(calls, rounds=5, warmup=1)
        for name, call in calls.items():
            found = call()
            apart = (found.state - limit.state).flatten(1).norm(dim=1) / limit.state.flatten(1).norm(dim=1)
            rows.append(
                {
                    "part": f"{name}, forgetting {forgetting or 'none'}",
                    "ms": times[name],
                    "evaluations": float(found.evaluations.double().mean()),
                    "converged": float(found.converged.double().mean()),
                    "same basin": float((apart < 0.05).double().mean()),
                }  # fmt: skip
            )
    return rows
