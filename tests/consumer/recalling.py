"""Typed code of a user: recall, memories, results. `mypy --strict` reads it, and the tests run it."""

from typing import Any, assert_type

import torch
from torch import Tensor

import hopdeq_lwpf
from hopdeq_lwpf import ConvergenceError, Memory, Result, Solution, Termination, find, load_solution, retrieve
from hopdeq_lwpf.forgetting import PFU, Forgetting, ReLU, TopK
from hopdeq_lwpf.memory import MemoryRecall
from hopdeq_lwpf.recall import Recall
from hopdeq_lwpf.solvers import LBFGS, Anderson, Implicit, Picard, Solver


def recalled(query: Tensor, patterns: Tensor) -> Recall:
    """Every keyword with a value of its type."""
    units: list[Forgetting] = [ReLU(), PFU(threshold=0.0), TopK(2)]
    found = [
        retrieve(
            query, patterns, beta=4.0, forgetting=unit, steps=None, stop=Termination(rtol=1e-6), trace=True
        )
        for unit in units
    ]
    solvers: list[Solver] = [Picard(damping=0.1), Anderson(memory=4), LBFGS()]
    found += [retrieve(query, patterns, solver=solver, adjoint=Implicit(rtol=1e-6)) for solver in solvers]
    return found[0]


def described(recall: Recall) -> dict[str, float]:
    """The fields of a recall have their types."""
    assert_type(recall.residual, Tensor)
    assert_type(recall.converged, Tensor)
    assert_type(recall.index, Tensor)
    assert_type(recall.energy, Tensor | None)
    try:
        recall.require()
    except ConvergenceError as error:
        return {str(error): 1.0}
    converged = (recall.result == Result.CONVERGED).double().mean()
    return {"converged": float(converged), "steps": float(recall.steps.double().mean())}


def main() -> None:
    """Runs in a folder that can be written to."""
    torch.manual_seed(0)
    patterns = torch.randn(6, 4)
    recall = recalled(patterns[:2] + 0.1, patterns)
    described(recall)
    recall.save("recall.safetensors")
    assert_type(load_solution("recall.safetensors"), Solution)
    memory = Memory(patterns, labels=list("abcdef"))
    assert_type(memory, Memory)
    assert_type(memory.add(torch.ones(4), labels="g"), Tensor)
    assert_type(memory.recall(patterns[:2], beta=4.0), MemoryRecall)
    assert_type(find("solvers", "lbfgs"), dict[str, Any])
    assert_type(hopdeq_lwpf.__version__, str)
