"""Trainings with the settings of the hflayers notebooks: AdamW 1e-3, batches of 32, gradients clipped to norm 1."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

BATCH = 32
# Hidden size 8, 8 heads, beta .25, dropout .5: the networks that the notebooks call adapted.
ADAPTED = {"hidden_size": 8, "num_heads": 8, "beta": 0.25, "dropout": 0.5}


@dataclass(frozen=True)
class Task:
    """Bags (B, N, width) and their labels (B,), for training and for validation."""

    seen: Tensor
    wanted: Tensor
    held: Tensor
    labels: Tensor


def split(items: Dataset, train: slice) -> Task:
    """A data set in the notebook's parts: these rows for training, the others for validation."""
    rows = [items[i] for i in range(len(items))]  # type: ignore[arg-type]
    bags = torch.stack([row["data"] for row in rows]).float()
    labels = torch.stack([row["target"] for row in rows]).float()
    held = torch.ones(len(bags), dtype=torch.bool)
    held[train] = False
    return Task(bags[~held], labels[~held], bags[held], labels[held])


def instances(task: Task) -> Tensor:
    """The different instances of the training bags, (quantity, width): what a lookup layer starts with."""
    return task.seen.reshape(-1, task.seen.shape[-1]).unique(dim=0)


def accuracies(
    build: Callable[[], nn.Module], task: Task, epochs: int, seed: int
) -> tuple[list[float], float]:
    """Validation accuracy after each epoch, and seconds an epoch, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    found = []
    start = time.perf_counter()
    for _ in range(epochs):
        network.train()
        for rows in torch.randperm(len(task.seen)).split(BATCH):
            loss = functional.binary_cross_entropy_with_logits(network(task.seen[rows]), task.wanted[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        network.eval()
        with torch.no_grad():
            guess = torch.cat([network(part) for part in task.held.split(BATCH)]) > 0
        found.append(float((guess == task.labels.bool()).double().mean()))
    return found, (time.perf_counter() - start) / epochs
