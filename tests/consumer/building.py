"""Typed code of a user: layers, functions of one's own, training. `mypy --strict` reads it, and the tests run it."""

from collections.abc import Callable
from typing import assert_type

import torch
from torch import Tensor, nn

from hopdeq_lwpf import Equilibrium, Solution, Termination, convert_attention, fixed_point, models
from hopdeq_lwpf.solvers import Adjoint, Anderson, OneStep
from hopdeq_lwpf.solvers import build as build_solver
from hopdeq_lwpf.training import CheckpointError, Learner, Learning, TrainSpec, load_weights


class Affine(nn.Module):
    """f(z, x) = z A' + x."""

    state_ndim = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.map.weight.mul_(0.5 / torch.linalg.matrix_norm(self.map.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.as_tensor(self.map(z)) + x


def solved(f: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Solution:
    """One solve with every keyword."""
    adjoint: Adjoint = OneStep()
    solution = fixed_point(
        f,
        x,
        torch.zeros_like(x),
        steps=None,
        solver="picard",
        stop=Termination(max_steps=50),
        adjoint=adjoint,
    )
    return assert_type(solution, Solution)


def network() -> nn.Module:
    """Layers go where modules go."""
    layer = Equilibrium(Affine(4), solver="anderson", on_failure="ignore")
    hopfield = models.Hopfield(4, steps=2, forgetting="relu")
    assert_type(hopfield, models.Hopfield)
    assert_type(layer.last_solution, Solution | None)
    pooling = models.HopfieldPooling(4, quantity=1)
    return nn.Sequential(layer, hopfield, pooling)


def main() -> None:
    """Runs in a folder that can be written to."""
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    solved(Affine(4), x)
    model = network()
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    assert_type(convert_attention(attention, steps=2), nn.Module)
    learner = Learner(model, Learning(learning_rate=0.1))
    assert_type(learner.learning, Learning)
    assert_type(TrainSpec(epochs=1).epochs, int)
    built = build_solver("anderson")
    assert isinstance(built, Anderson)
    assert_type(built.memory, int)
    try:
        load_weights("nowhere.ckpt", model)
    except CheckpointError as error:
        if "nowhere.ckpt" not in str(error):
            raise
