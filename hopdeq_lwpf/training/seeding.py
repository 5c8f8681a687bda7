"""The same numbers in every run: an epoch depends on weights, optimiser, seed and its own number alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn


class SeededEpochs(Callback):
    """Seeds torch, numpy and random at the start of each epoch, from the seed and the number of the epoch.

    A resumed run then draws what the uninterrupted one drew: data order, dropout, noise of forgetting units.
    torch.Generator objects that modules or loaders hold are not seeded, since they were given on purpose; their
    states go into the checkpoint. Processes of a distributed run draw differently, the same each time.
    It must be the first callback, so that the others draw after it.
    """

    def __init__(self, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}")
        self.seed = seed
        self._trainer: Trainer | None = None
        self._restored: dict[str, torch.Tensor] | None = None
        self._begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None:
            self._restore(trainer, self._restored)
            self._restored = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_everything(self.seed, trainer.current_epoch, trainer.global_rank)
        fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
        if fetcher is not None and not self._begun:
            # The Trainer made the iterator of its first epoch before this hook, from another state.
            iter(fetcher)
        self._begun = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = False

    def state_dict(self) -> dict[str, Any]:
        """The seed, and the state of every generator that modules or loaders hold."""
        held = {} if self._trainer is None else _held(self._trainer)
        return {"seed": self.seed, "generators": {name: g.get_state() for name, g in held.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` holds; the generators when training starts, where the loaders are there."""
        self.seed = int(state_dict["seed"])
        self._restored = dict(state_dict["generators"])

    @staticmethod
    def _restore(trainer: Trainer, states: dict[str, torch.Tensor]) -> None:
        for name, generator in _held(trainer).items():
            if name in states:
                generator.set_state(states[name].cpu())


def seed_everything(seed: int, epoch: int = 0, process: int = 0) -> None:
    """Seed torch, numpy and random with a number mixed from the three, so that none repeats another's stream."""
    words = np.random.SeedSequence((seed, epoch, process)).generate_state(3, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[1] % (1 << 32)))
    random.seed(int(words[2]))


def generators(model: nn.Module) -> dict[str, torch.Generator]:
    """The torch.Generator objects that modules hold as attributes, by qualified name."""
    return {
        f"{name}.{attribute}".lstrip("."): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Generator)
    }


def _held(trainer: Trainer) -> dict[str, torch.Generator]:
    held = {f"model {name}": value for name, value in generators(trainer.lightning_module).items()}
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    for number, loader in enumerate(combined.flattened if combined is not None else ()):
        for part in ("", "sampler", "batch_sampler"):
            generator = getattr(getattr(loader, part) if part else loader, "generator", None)
            if isinstance(generator, torch.Generator):
                held[f"loader {number} {part}".rstrip()] = generator
    return held
