"""One equilibrium layer in torchdeq and in hopdeq_lwpf, and each with the other's solvers."""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchdeq import get_deq

from hopdeq_lwpf import Equilibrium, Termination
from hopdeq_lwpf.solvers import Picard
from hopdeq_lwpf.solvers.torchdeq_registry import register_with_torchdeq

REPEATS = 3
TOLERANCE = 1e-5


class Cell(nn.Module):
    """z = tanh(W z + x); |W| = .97, so that plain iteration needs hundreds of steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.recur = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.recur.weight, 0.97)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recur(z) + x)


def exact_gradient(cell: Cell, x: Tensor) -> Tensor:
    """The gradient of the loss in float64, solved to rounding."""
    twin = Cell(x.shape[1]).double()
    twin.load_state_dict(cell.state_dict())
    stop = Termination(rtol=1e-13, max_steps=20_000)
    Equilibrium(twin, solver=Picard(), stop=stop, on_failure="raise")(x.double()).square().mean().backward()
    return twin.recur.weight.grad.float()


def in_torchdeq(cell: Cell, x: Tensor, **options: object) -> Callable[[], tuple[Tensor, float]]:
    """torchdeq's layer; a call solves and returns the state and the largest number of steps."""
    deq = get_deq(ift=True, **options)

    def solve() -> tuple[Tensor, float]:
        states, info = deq(lambda z: cell(z, x), torch.zeros_like(x))
        return states[-1], float(info["nstep"].max())

    return solve


def in_hopdeq(cell: Cell, x: Tensor, **options: object) -> Callable[[], tuple[Tensor, float]]:
    """Our layer, likewise."""
    layer = Equilibrium(cell, stop=Termination(rtol=TOLERANCE, max_steps=400), **options)

    def solve() -> tuple[Tensor, float]:
        solution = layer(x, return_solution=True)
        return solution.value, float(solution.steps.max())

    return solve


register_with_torchdeq()
torch.manual_seed(0)
torch.set_num_threads(1)  # so small that a second thread costs more than it brings
cell, x = Cell(32), 0.3 * torch.randn(64, 32)
expected = exact_gradient(cell, x)
cell.zero_grad()
tuned = {"f_tol": TOLERANCE, "b_tol": TOLERANCE, "f_stop_mode": "rel", "b_stop_mode": "rel"}
tuned |= {"f_max_iter": 400, "b_max_iter": 400}
layers = {
    "torchdeq, as it comes": in_torchdeq(cell, x),
    "torchdeq, fixed_point_iter": in_torchdeq(cell, x, **tuned),
    "torchdeq, anderson": in_torchdeq(cell, x, f_solver="anderson", b_solver="anderson", **tuned),
    "torchdeq, broyden": in_torchdeq(cell, x, f_solver="broyden", b_solver="broyden", **tuned),
    "torchdeq, hopdeq_anderson": in_torchdeq(
        cell, x, f_solver="hopdeq_anderson", b_solver="hopdeq_anderson", **tuned
    ),
    "hopdeq_lwpf, as it comes": in_hopdeq(cell, x),
    "hopdeq_lwpf, anderson": in_hopdeq(cell, x, solver="anderson"),
    "hopdeq_lwpf, torchdeq:broyden": in_hopdeq(cell, x, solver="torchdeq:broyden"),
}
times: dict[str, list[float]] = {name: [] for name in layers}
rows: dict[str, tuple[float, float, float]] = {}
for _ in range(REPEATS):
    for name, solve in layers.items():
        cell.zero_grad()
        start = time.perf_counter()
        state, steps = solve()
        state.square().mean().backward()
        times[name].append(time.perf_counter() - start)
        with torch.no_grad():
            image = cell(state, x)
            residual = ((image - state).norm(dim=1) / image.norm(dim=1)).max()
        error = (cell.recur.weight.grad - expected).norm() / expected.norm()
        rows[name] = (float(residual), steps, float(error))

table = Table(title=f"z = tanh(W z + x), 64 problems of 32 numbers, relative tolerance {TOLERANCE:g}")
for heading in ("layer", "worst residual", "steps", "gradient error", "forward + backward, ms"):
    table.add_column(heading, justify="left" if heading == "layer" else "right")
for name, (residual, steps, error) in rows.items():
    milliseconds = 1e3 * statistics.median(times[name])
    table.add_row(name, f"{residual:.1e}", f"{steps:.0f}", f"{error:.1e}", f"{milliseconds:.1f}")
Console().print(table)
