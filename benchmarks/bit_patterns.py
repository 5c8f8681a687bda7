"""Bit-pattern bags with the settings of the hflayers notebook: one softmax or four, forgetting or none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
from torch import nn

from benchmarks.notebooks import ADAPTED, Task, accuracies, instances, split
from hopdeq_lwpf.data import BitPatternSet
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import DiffusionHopfield, Hopfield, HopfieldLayer, HopfieldPooling

EPOCHS, LAST = 250, 10
SEEDS, MORE = (42, 43, 44), (45, 46, 47, 48, 49)
TRAIN = slice(256, 1792)  # of 2,048 bags; the other 512 are the validation set of the notebook
BITS, BAG = 8, 16


@dataclass(frozen=True)
class Run:
    """One training."""

    layer: str  # "Hopfield", "Diffusion", "Pooling" or "Lookup"
    steps: int | None
    forgetting: str | None
    seed: int

    def network(self, task: Task) -> nn.Module:
        # The published unit draws its threshold from the whole tensor, with noise of .01 squared.
        unit = PFU(scope="tensor", noise=1e-4) if self.forgetting == "pfu" else self.forgetting
        options = {"input_size": BITS, "steps": self.steps, "forgetting": unit}
        if self.layer == "Pooling":
            return nn.Sequential(HopfieldPooling(**ADAPTED, **options), nn.Linear(BITS, 1), nn.Flatten(0))
        if self.layer == "Hopfield":
            layer: nn.Module = Hopfield(**ADAPTED, **options)
        elif self.layer == "Diffusion":  # of stored patterns and states alike
            layer = DiffusionHopfield(**ADAPTED, **options, eta=0.1, lam=0.1)
        else:
            layer = _lookup(task, options)
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(BITS * BAG, 1), nn.Flatten(0))


def _lookup(task: Task, options: dict[str, object]) -> HopfieldLayer:
    """One head that looks up among the different training instances; what it reads out is drawn once and stays."""
    stored = instances(task)
    layer = HopfieldLayer(
        **options,
        quantity=len(stored),
        lookup_weights_as_separated=True,
        lookup_targets_as_trainable=False,
    )
    with torch.no_grad():
        layer.lookup_weights.copy_(stored)
    return layer


RUNS = [
    Run(layer, steps, forgetting, seed)
    for layer, steps, forgetting, seeds in (
        ("Hopfield", 4, None, SEEDS + MORE[:2]),
        ("Hopfield", 1, None, SEEDS),
        ("Hopfield", 1, "relu", SEEDS),
        ("Hopfield", 1, "pfu", SEEDS),
        ("Diffusion", 4, None, SEEDS + MORE[:2]),
        ("Pooling", 4, None, SEEDS),
        ("Pooling", 1, None, SEEDS),
        # These scatter by some .05 to .1 between seeds.
        ("Pooling", 1, "relu", SEEDS + MORE),
        ("Pooling", 1, "pfu", SEEDS + MORE),
        ("Lookup", 1, None, SEEDS + MORE),
    )
    for seed in seeds
]


def train(run: Run) -> dict[str, object]:
    """The mean validation accuracy of the last ten epochs, and the best."""
    task = split(BitPatternSet(), TRAIN)
    found, seconds = accuracies(partial(run.network, task), task, EPOCHS, run.seed)
    return {
        "layer": run.layer, "steps": run.steps, "forgetting": run.forgetting or "none", "seed": run.seed,
        "last ten": round(sum(found[-LAST:]) / LAST, 4), "best": round(max(found), 4),
        "seconds an epoch": round(seconds, 3),
    }  # fmt: skip


def run() -> list[dict[str, object]]:
    """All runs, two at a time, one thread each; a line for each as it ends."""
    rows = []
    with get_context("spawn").Pool(2) as pool:
        for row in pool.imap(train, RUNS):
            print(row, flush=True)  # noqa: T201 (minutes pass between two)
            rows.append(row)
    return rows
