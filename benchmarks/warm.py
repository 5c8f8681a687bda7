"""Warm starts in training: evaluations saved, equilibria and gradients changed. Digits, three seeds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from hopdeq_lwpf import Equilibrium, Solution, Termination
from hopdeq_lwpf.data import Preprocessing, load_digits
from hopdeq_lwpf.retrieval import Retrieval, RetrievalContext

EPOCHS, BATCH, SEEDS, TRAIN = 8, 128, (0, 1, 2), 1500
ELSEWHERE = 0.05  # relative distance from which two states are two equilibria
STOP = Termination(rtol=1e-5, max_steps=500, check_every=1)


class Recall(nn.Module):
    """Recall from 256 learned patterns; the projected digit is the start and enters every step."""

    state_ndim = 1
    inject = "input"
    has_energy = True

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.project = nn.Linear(64, 64, bias=False)
        nn.init.eye_(self.project.weight)
        self.patterns = nn.Parameter(data[torch.randperm(len(data))[:256]].clone())
        self.step = Retrieval(16.0, inject="input", inject_weight=0.3)

    def prepare(self, x: Tensor) -> RetrievalContext:
        return self.step.prepare(self.project(x), self.patterns)

    def init(self, x: RetrievalContext) -> Tensor:
        return self.step.init(x)

    def forward(self, z: Tensor, x: RetrievalContext) -> Tensor:
        return self.step(z, x)

    def __getattr__(self, name: str) -> object:
        # Energy, metric and the rest are those of the retrieval.
        if name in ("energy", "evaluate", "metric", "select"):
            return getattr(super().__getattr__("step"), name)
        return super().__getattr__(name)


class Cell(nn.Module):
    """z = tanh(.95 W z / |W| + U x), without an energy; a contraction, so that there is one equilibrium."""

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.inner.weight
        return 0.95 * weight / torch.linalg.matrix_norm(weight, 2), self.outer(x)

    def init(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return torch.zeros_like(x[1])

    def forward(self, z: Tensor, x: tuple[Tensor, Tensor]) -> Tensor:
        return torch.tanh(z @ x[0].T + x[1])


MODELS = {"recall": Recall, "tanh cell": Cell}


def _solved(
    layer: Equilibrium, head: nn.Module, x: Tensor, y: Tensor, index: Tensor | None
) -> tuple[Solution, Tensor]:
    """The solution, and the gradient of the loss in one vector."""
    solution = layer(x, index=index, return_solution=True)
    loss = functional.cross_entropy(head(solution.value), y)
    gradients = torch.autograd.grad(loss, [*layer.parameters(), *head.parameters()])
    return solution, torch.cat([g.reshape(-1) for g in gradients])


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    return iter(torch.randperm(count, generator=generator).split(BATCH))


def _train(name: str, warm: bool, seed: int) -> tuple[list[dict[str, float]], float]:
    """One training run: what each epoch measured, and the accuracy on the rest of the digits."""
    torch.manual_seed(seed)
    images, labels = load_digits()
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    data = Preprocessing.fit(images[:TRAIN], "center-unit")(images)
    layer = Equilibrium(MODELS[name](data[:TRAIN]), stop=STOP, warm_start=True, on_failure="ignore")
    head = nn.Linear(64, 10)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for epoch in range(EPOCHS):
        sums: dict[str, float] = {}
        for index in _batches(TRAIN, generator):
            x, y = data[index], labels[index]
            cold, gradient = _solved(layer, head, x, y, None)
            if warm:
                started, used = _solved(layer, head, x, y, index)
            else:
                started, used = cold, gradient
            apart = (started.state - cold.state).norm(dim=-1) / cold.state.norm(dim=-1)
            measured = {
                "cold evaluations": float(cold.evaluations.sum()),
                "warm evaluations": float(started.evaluations.sum()),
                "elsewhere": float((apart > ELSEWHERE).sum()),
                "unconverged": float((~started.converged).sum()),
                "gradient difference": float((used - gradient).norm() / gradient.norm()) * len(index),
            }
            sums = {key: sums.get(key, 0.0) + value for key, value in measured.items()}
            for parameter, part in zip(parameters, used.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.reshape(parameter.shape)
            optimizer.step()
        rows.append({"epoch": epoch + 1, **{key: value / TRAIN for key, value in sums.items()}})
    with torch.no_grad():
        right = (head(layer(data[TRAIN:])).argmax(-1) == labels[TRAIN:]).float().mean()
    return rows, float(right)


def run() -> list[dict[str, object]]:
    """One row a model and epoch (means over seeds), and the accuracies of cold and warm training."""
    rows: list[dict[str, object]] = []
    for name in MODELS:
        warm = [_train(name, True, seed) for seed in SEEDS]
        cold = [_train(name, False, seed) for seed in SEEDS]
        for epochs in zip(*(measured for measured, _ in warm), strict=True):
            mean = {key: round(sum(row[key] for row in epochs) / len(epochs), 4) for key in epochs[0]}
            rows.append({"model": name, **mean})
        rows.append(
            {
                "model": name,
                "accuracy warm": [round(accuracy, 4) for _, accuracy in warm],
                "accuracy cold": [round(accuracy, 4) for _, accuracy in cold],
            }
        )
    return rows
