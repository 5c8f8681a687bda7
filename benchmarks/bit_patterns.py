"""Bit-pattern bags with the settings of the hflayers notebooks: one softmax or four, forgetting or none."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from torch.nn import functional

from hopdeq_lwpf.data import BitPatternSet
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import Hopfield, HopfieldPooling

EPOCHS, BATCH, SEEDS, LAST = 250, 32, (42, 43, 44), 10
TRAIN = slice(256, 1792)  # of 2,048 bags; the other 512 are the validation set of the notebook
# hidden size 8, 8 heads, beta .25, dropout .5: the network that the notebook calls adapted.
ADAPTED = {"input_size": 8, "hidden_size": 8, "num_heads": 8, "beta": 0.25, "dropout": 0.5}


@dataclass(frozen=True)
class Run:
    """One training."""

    layer: str  # "Hopfield" or "Pooling"
    steps: int | None
    forgetting: str | None
    seed: int

    def network(self) -> nn.Module:
        # The published unit draws its threshold from the whole tensor, with noise of .01 squared.
        unit = PFU(scope="tensor", noise=1e-4) if self.forgetting == "pfu" else self.forgetting
        options = {**ADAPTED, "steps": self.steps, "forgetting": unit}
        if self.layer == "Hopfield":
            return nn.Sequential(Hopfield(**options), nn.Flatten(), nn.Linear(8 * 16, 1), nn.Flatten(0))
        return nn.Sequential(HopfieldPooling(**options), nn.Linear(8, 1), nn.Flatten(0))


RUNS = [
    Run(layer, steps, forgetting, seed)
    for layer in ("Hopfield", "Pooling")
    for steps, forgetting in ((4, None), (1, None), (1, "relu"), (1, "pfu"))
    for seed in SEEDS
]


def _bags() -> tuple[Tensor, Tensor]:
    items = BitPatternSet()
    rows = [items[i] for i in range(len(items))]
    return torch.stack([row["data"] for row in rows]).float(), torch.stack(
        [row["target"] for row in rows]
    ).float()


def train(run: Run) -> dict[str, object]:
    """The mean validation accuracy of the last ten epochs, and the best."""
    torch.set_num_threads(1)
    bags, labels = _bags()
    held = torch.ones(len(bags), dtype=torch.bool)
    held[TRAIN] = False
    seen, wanted = bags[~held], labels[~held]
    torch.manual_seed(run.seed)
    network = run.network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    accuracies = []
    start = time.perf_counter()
    for _ in range(EPOCHS):
        network.train()
        for rows in torch.randperm(len(seen)).split(BATCH):
            loss = functional.binary_cross_entropy_with_logits(network(seen[rows]), wanted[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        network.eval()
        with torch.no_grad():
            guess = torch.cat([network(part) for part in bags[held].split(BATCH)]) > 0
        accuracies.append(float((guess == labels[held].bool()).double().mean()))
    return {
        "layer": run.layer, "steps": run.steps, "forgetting": run.forgetting or "none", "seed": run.seed,
        "last ten": round(sum(accuracies[-LAST:]) / LAST, 4), "best": round(max(accuracies), 4),
        "seconds an epoch": round((time.perf_counter() - start) / EPOCHS, 3),
    }  # fmt: skip


def run() -> list[dict[str, object]]:
    """All runs, two at a time, one thread each; a line for each as it ends."""
    rows = []
    with get_context("spawn").Pool(2) as pool:
        for row in pool.imap(train, RUNS):
            print(row, flush=True)  # noqa: T201 (minutes pass between two)
            rows.append(row)
    return rows
