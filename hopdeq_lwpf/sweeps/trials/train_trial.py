"""One trial of a study: train, measure, and say everything in one record. Runs in a worker process."""

from __future__ import annotations

import math
import shutil
import time
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from hopdeq_lwpf.sweeps.engine.epoch_reports import Reports
from hopdeq_lwpf.sweeps.engine.jobs import failure
from hopdeq_lwpf.sweeps.engine.records import curves
from hopdeq_lwpf.sweeps.engine.versions import versions
from hopdeq_lwpf.training.checkpoints import LAST, CheckpointError
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


class EpochReports(Callback):
    """Tells the score after each epoch to the driver of a search, and ends the training where that says so.

    stopped: the epoch after which it was ended.
    """

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        self.stopped: int | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        value = trainer.callback_metrics.get(self._reports.metric)
        # The end of the last epoch ends the training anyway.
        if self._reports(epoch, math.nan if value is None else float(value)) and epoch != trainer.max_epochs:
            self.stopped = epoch
            trainer.should_stop = True


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


def run_trial(settings: Mapping[str, Any], folder: Path, reports: Reports | None = None) -> dict[str, Any]:
    """Train with the settings (`TrainSpec.as_dict()`) in `folder`; returns the part of the record that is found out.

    reports: asked after each epoch whether to stop; then "pruned" is the number of epochs.
    Goes on from the folder's last.ckpt where there is one. What goes wrong is returned under "failure".
    """
    started = time.perf_counter()
    found: dict[str, Any] = {"curves": {}, "costs": {}, "warnings": [], "failure": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            spec = TrainSpec(**{**settings, "out": str(folder), "resume": False})
            clock, data = EpochClock(), build_data(spec.data, spec.seed)
            listener = None if reports is None else EpochReports(reports)
            trained = _train(spec, folder, clock, data, listener)
            if listener is not None:
                found["pruned"] = listener.stopped
            found["curves"] = curves(trained.metrics.records)
            found["costs"] = _costs(trained, clock, data)
        except Exception as error:  # one trial must not end the study
            found["failure"] = failure(error)
    found["warnings"] = list(dict.fromkeys(" ".join(str(w.message).split()) for w in caught))[:WARNINGS]
    found["run_seconds"] = round(time.perf_counter() - started, 3)  # of this process, also where it resumed
    found["versions"] = versions()
    return found


def _train(
    spec: TrainSpec, folder: Path, clock: EpochClock, data: Any, listener: EpochReports | None
) -> Trained:
    callbacks = (clock,) if listener is None else (clock, listener)
    if (folder / LAST).exists():
        try:
            return train(replace(spec, resume=True), data=data, callbacks=callbacks)
        except CheckpointError:
            clock.load_state_dict({"seconds": [], "cpu_seconds": []})
    # What is left of a run without a usable checkpoint would be taken for a run that must not be overwritten.
    shutil.rmtree(folder, ignore_errors=True)
    return train(spec, data=data, callbacks=callbacks)


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
