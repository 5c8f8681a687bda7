"""One trial of a study: train, measure, and say everything in one record. Runs in a worker process."""

from __future__ import annotations

import platform
import shutil
import time
import traceback
import warnings
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from hopdeq_lwpf import __version__
from hopdeq_lwpf.sweeps.study_records import curves
from hopdeq_lwpf.training.checkpoints import BEST, LAST, CheckpointError
from hopdeq_lwpf.training.datasets import build_data
from hopdeq_lwpf.training.learner import Learner
from hopdeq_lwpf.training.run import Trained, train
from hopdeq_lwpf.training.spec import TrainSpec

WARNINGS = 5  # of each trial, the first different ones


class EpochClock(Callback):
    """Seconds of the training batches of each epoch, by the wall and of this process's CPU time.

    The times stand in the checkpoints, so that a resumed run knows those of its beginning.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._start: tuple[float, float] | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()  # validation lies inside of the epoch of training

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._start is not None:
            self.seconds.append(time.perf_counter() - self._start[0])
            self.cpu_seconds.append(time.process_time() - self._start[1])
            self._start = None

    def state_dict(self) -> dict[str, Any]:
        """The times so far."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from them."""
        self.seconds, self.cpu_seconds = list(state_dict["seconds"]), list(state_dict["cpu_seconds"])


class _Held:
    """A tensor that autograd keeps for the backward pass, with an identity of its own."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(learner: Learner, batch: Any) -> int:
    """Bytes that autograd holds for the backward pass when the loss of a batch is there, in training mode.

    Counts each storage once and leaves out the parameters, which are there anyway. What a solver needed on the
    way and let go does not count.
    """
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        alive.add(held)
        return held

    learner.model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = learner.training_step(batch, 0)
        own = {parameter.untyped_storage().data_ptr() for parameter in learner.parameters()}
        storages = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage() for held in alive}
    count = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)
    del loss
    return count


def run_trial(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train with the settings (`TrainSpec.as_dict()`) in `folder`; returns the part of the record that is found out.

    Goes on from the folder's last.ckpt where there is one. What goes wrong is returned under "failure".
    """
    started = time.perf_counter()
    found: dict[str, Any] = {"curves": {}, "costs": {}, "warnings": [], "failure": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            spec = TrainSpec(**{**settings, "out": str(folder), "resume": False})
            clock, data = EpochClock(), build_data(spec.data, spec.seed)
            trained = _train(spec, folder, clock, data)
            found["curves"] = curves(trained.metrics.records)
            found["costs"] = _costs(trained, clock, data)
        except Exception as error:  # one trial must not end the study
            found["failure"] = {
                "error": type(error).__name__,
                "message": " ".join(str(error).split()),
                "traceback": traceback.format_exc(),
            }
    found["warnings"] = list(dict.fromkeys(" ".join(str(w.message).split()) for w in caught))[:WARNINGS]
    found["run_seconds"] = round(time.perf_counter() - started, 3)  # of this process, also where it resumed
    found["versions"] = versions()
    return found


def _train(spec: TrainSpec, folder: Path, clock: EpochClock, data: Any) -> Trained:
    if (folder / LAST).exists():
        try:
            return train(replace(spec, resume=True), data=data, callbacks=(clock,))
        except CheckpointError:
            clock.load_state_dict({"seconds": [], "cpu_seconds": []})
    # What is left of a run without a usable checkpoint would be taken for a run that must not be overwritten.
    shutil.rmtree(folder, ignore_errors=True)
    return train(spec, data=data, callbacks=(clock,))


def _costs(trained: Trained, clock: EpochClock, data: Any) -> dict[str, Any]:
    batch = next(iter(data.train_dataloader()))
    return {
        "seconds": round(sum(clock.seconds), 4),
        "epoch_seconds": _median(clock.seconds),
        "epoch_cpu_seconds": _median(clock.cpu_seconds),
        "saved_bytes": saved_bytes(trained.learner, batch),
        "parameters": _parameters(trained.model),
    }


def _median(seconds: list[float]) -> float | None:
    return round(float(np.median(seconds)), 5) if seconds else None


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def versions() -> dict[str, str]:
    """Of everything that makes the numbers."""
    return {
        "hopdeq_lwpf": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def remove_checkpoints(folder: Path) -> None:
    """Delete what a finished trial no longer needs; metrics.jsonl and config.yaml stay."""
    for name in (LAST, BEST):
        with suppress(OSError):  # a file that cannot be deleted must not end the study
            (folder / name).unlink(missing_ok=True)
