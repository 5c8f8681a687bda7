"""Time of one retrieval step with each separation function, over that with softmax."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.problems import BETA, QUERIES, clustered, random_unit
from benchmarks.timing import interleaved
from hopdeq_lwpf.retrieval import Retrieval, RetrievalContext
from hopdeq_lwpf.separation import Entmax, Separation, make_separation
from hopdeq_lwpf.solvers.allocator import settle

COUNT = 1024
SEPARATIONS: dict[str, Separation] = {
    **{
        name: make_separation(name)
        for name in ("softmax", "softmax1", "sparsemax", "entmax15", "hardmax", "polynomial", "lsr")
    },
    **{f"entmax {alpha}": Entmax(alpha) for alpha in (1.01, 1.25, 1.75)},
}


def _scenes() -> dict[str, tuple[Tensor, Tensor, float]]:
    """Patterns, states and beta: starts, and where two steps of softmax have led."""
    made = {
        "clusters": (*clustered(0.9, 0.995), BETA),
        "random": (*random_unit(COUNT), 12.0),
        "near-uniform": (*random_unit(COUNT), 1.0),
    }
    scenes = {}
    for name, (patterns, query, beta) in made.items():
        patterns, state = patterns.float(), query.float()
        scenes[f"{name}, start"] = (patterns, state, beta)
        for _ in range(2):
            state = torch.softmax(beta * state @ patterns.T, -1) @ patterns
        scenes[f"{name}, later"] = (patterns, state, beta)
    return scenes


def _step(f: Retrieval, z: Tensor, x: RetrievalContext) -> Tensor:
    with torch.no_grad():
        return f(z, x)


def run() -> list[dict[str, object]]:
    """One row a scene and separation; milliseconds are medians of interleaved runs, without gradient.

    All see the same scores, also LSR, which is timed with the dot product: its own similarity costs as much for
    any other.
    """
    settle()
    rows: list[dict[str, object]] = []
    for scene, (patterns, state, beta) in _scenes().items():
        calls, support = {}, {}
        for name, separation in SEPARATIONS.items():
            f = Retrieval(beta, separation=separation, similarity="dot")
            x = f.prepare(state, patterns)
            calls[name] = partial(_step, f, state, x)
            support[name] = float((f.weights(state, x) > 0).sum(-1).double().mean())
        times = interleaved(calls, rounds=31)
        for name, ms in times.items():
            rows.append(
                {
                    "scores": scene,
                    "separation": name,
                    "queries": QUERIES,
                    "patterns": len(patterns),
                    "support": round(support[name], 1),
                    "ms": round(ms, 3),
                    "over softmax": round(ms / times["softmax"], 2),
                }
            )
    return rows
