"""Latch sequences with the settings of the hflayers notebook: the first of 32 elements decides."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.notebooks import ADAPTED, Task, accuracies, instances, split
from hopdeq_lwpf.data import LatchSequenceSet
from hopdeq_lwpf.models import Hopfield, HopfieldLayer, HopfieldPooling

EPOCHS, SEEDS = 3, (42, 43, 44)
TRAIN = slice(512, 3584)  # of 4,096 sequences
CHARACTERS, LENGTH = 20, 32


def _network(layer: str, adapted: bool, task: Task) -> nn.Module:
    options = {"input_size": CHARACTERS, **({"steps": 4, **ADAPTED} if adapted else {})}
    if layer == "Pooling":
        return nn.Sequential(HopfieldPooling(**options), nn.Linear(CHARACTERS, 1), nn.Flatten(0))
    if layer == "Hopfield":
        core: nn.Module = Hopfield(**options)
    else:
        core = _lookup(instances(task), adapted)
    return nn.Sequential(core, nn.Flatten(), nn.Linear(CHARACTERS * LENGTH, 1), nn.Flatten(0))


def _lookup(stored: torch.Tensor, adapted: bool) -> HopfieldLayer:
    """As many patterns as there are characters; adapted: these themselves, and separate targets that stay."""
    layer = HopfieldLayer(
        CHARACTERS,
        quantity=len(stored),
        lookup_weights_as_separated=adapted,
        lookup_targets_as_trainable=not adapted,
    )
    if adapted:
        with torch.no_grad():
            layer.lookup_weights.copy_(stored)
    return layer


def run() -> list[dict[str, object]]:
    """Validation accuracy after each of the first epochs, one row a network and seed."""
    task = split(LatchSequenceSet(), TRAIN)
    rows: list[dict[str, object]] = []
    for layer in ("Hopfield", "Pooling", "Lookup"):
        for adapted in (False, True):
            for seed in SEEDS:
                found, seconds = accuracies(partial(_network, layer, adapted, task), task, EPOCHS, seed)
                epochs = {f"epoch {number}": accuracy for number, accuracy in enumerate(found, 1)}
                settings = "adapted" if adapted else "base"
                rows.append(
                    {
                        "layer": layer,
                        "settings": settings,
                        "seed": seed,
                        **epochs,
                        "seconds": round(seconds, 2),
                    }
                )
    return rows
