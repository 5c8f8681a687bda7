"""Your own f(z, x) as an equilibrium layer: train it with implicit gradients and look at the diagnostics."""

import torch
from rich.console import Console
from torch import Tensor, nn

from hopdeq_lwpf import Equilibrium


class Cell(nn.Module):
    """z = tanh(W z + U x), W scaled so that the map contracts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.recur = nn.Linear(width, width)
        self.enter = nn.Linear(1, width)
        with torch.no_grad():
            self.recur.weight.mul_(0.9 / torch.linalg.matrix_norm(self.recur.weight, 2))

    def init(self, x: Tensor) -> Tensor:  # (B, 1) -> (B, width)
        return x.new_zeros(x.shape[0], self.recur.out_features)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recur(z) + self.enter(x))


torch.manual_seed(0)
layer = Equilibrium(Cell(16))
model = nn.Sequential(layer, nn.Linear(16, 1))
optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
x = torch.linspace(-2, 2, 128)[:, None]
target = torch.sin(2 * x)
console = Console()
for epoch in range(201):
    loss = (model(x) - target).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if epoch % 50 == 0:
        solution = layer.last_solution
        console.print(
            f"epoch {epoch:3d} loss {loss.item():.4f} steps {int(solution.steps.max())} "
            f"worst residual {float(solution.residual.max()):.1e} "
            f"adjoint products {int(solution.adjoint.steps.max())} ({solution.adjoint.method})"
        )
