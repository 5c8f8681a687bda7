"""A step of training of the Hopfield layers: one softmax, four, and the equilibrium; time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.bit_patterns import BAG, BITS, TRAIN
from benchmarks.notebooks import ADAPTED, BATCH, split
from hopdeq_lwpf.data import BitPatternSet
from hopdeq_lwpf.models import Hopfield, HopfieldLayer, HopfieldPooling

WARM, ROUNDS, STEPS = 192, 21, 8
SETTINGS: dict[str, dict[str, object]] = {
    "1": {"steps": 1},
    "4": {"steps": 4},
    "converged, start": {"steps": None, "inject": "start"},
    "converged, input": {"steps": None, "inject": "input"},
    "converged, input, one-step": {"steps": None, "inject": "input", "adjoint": "onestep"},
}


def _network(layer: str, size: str, options: dict[str, object]) -> nn.Module:
    torch.manual_seed(0)
    given = {"input_size": BITS, **(ADAPTED if size == "adapted" else {}), **options}
    if layer == "Pooling":
        return nn.Sequential(HopfieldPooling(**given), nn.Linear(BITS, 1), nn.Flatten(0))
    core = Hopfield(**given) if layer == "Hopfield" else HopfieldLayer(**given, quantity=255)
    return nn.Sequential(core, nn.Flatten(), nn.Linear(BITS * BAG, 1), nn.Flatten(0))


class _Training:
    """A network with its optimiser that walks through the batches of the notebook."""

    def __init__(self, network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.network, self.batches, self.place = network, batches, 0
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step(self) -> None:
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()

    def loss(self) -> Tensor:
        bags, labels = self.batches[self.place % len(self.batches)]
        self.place += 1
        self.optimizer.zero_grad()
        return functional.binary_cross_entropy_with_logits(self.network(bags), labels)

    def saved(self) -> int:
        """Bytes that autograd keeps for the backward pass of a batch, each storage once, parameters apart."""
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        own = {parameter.untyped_storage().data_ptr() for parameter in self.network.parameters()}
        count = sum(size for pointer, size in sizes.items() if pointer not in own)
        del loss
        return count


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - start) / STEPS


def run() -> list[dict[str, object]]:
    """Median milliseconds of a step of training, interleaved, after four epochs of it; and bytes kept."""
    task = split(BitPatternSet(), TRAIN)
    batches = list(zip(task.seen.split(BATCH), task.wanted.split(BATCH), strict=True))
    rows: list[dict[str, object]] = []
    for layer in ("Hopfield", "Pooling", "Lookup"):
        for size in ("base", "adapted"):
            trainings = {
                name: _Training(_network(layer, size, options), batches) for name, options in SETTINGS.items()
            }
            times: dict[str, list[float]] = {name: [] for name in trainings}
            for training in trainings.values():
                for _ in range(WARM):
                    training.step()
            for _ in range(ROUNDS):
                for name, training in trainings.items():
                    times[name].append(_seconds(training.step))
            one, least = float(np.median(times["1"])), trainings["1"].saved()
            for name, training in trainings.items():
                solution = training.network[0].last_solution
                rows.append(
                    {
                        "layer": layer,
                        "size": size,
                        "steps": name,
                        "ms a step": round(1e3 * float(np.median(times[name])), 2),
                        "over one step": round(float(np.median(times[name])) / one, 2),
                        "MB kept": round(training.saved() / 1e6, 3),
                        "kept over one step": round(training.saved() / least, 2),
                        "steps median": float(solution.steps.double().median()),
                        "steps max": int(solution.steps.max()),
                        "seconds an epoch": round(float(np.median(times[name])) * len(batches), 3),
                    }
                )
    return rows
