"""metrics.jsonl: one JSON object a line, only ever appended to, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from hopdeq_lwpf.data import DataError


class MetricsFile(Checkpoint):
    """Writes every metric of an epoch to a file, one line an epoch, before any checkpoint of it is saved.

    A line holds step (optimiser steps so far), epoch (finished ones), time (seconds since 1970), seconds (of
    this process), lr and metrics, a mapping. NaN and infinity are no JSON: such a metric is null, and
    "nonfinite" says which of them it was. A resumed run appends {"resumed_at": step}; lines above that step
    from before it are of a course that was lost, and `read_metrics` leaves them out.
    A line is one write: a killed process leaves whole lines. (It is a Lightning `Checkpoint` because those
    run last, when all metrics are there; list it before the ones that save.)
    path: made with its folder where it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()
        if (
            trainer.is_global_zero
            and self.path.exists()
            and (self.path.stat().st_size or trainer.global_step)
        ):
            append(self.path, {"resumed_at": trainer.global_step, "time": time.time()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = {name: _number(value) for name, value in sorted(trainer.callback_metrics.items())}
        record: dict[str, Any] = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch + 1,
            "time": time.time(),
            "seconds": round(time.monotonic() - self._start, 3),
            "lr": trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None,
        }
        append(self.path, {**record, **finite(values)})


def finite(values: Mapping[str, float]) -> dict[str, Any]:
    """{"metrics": ..., "nonfinite": ...}: NaN and infinities as null, and what they were, by name."""
    bad = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
    metrics = {name: None if name in bad else value for name, value in values.items()}
    return {"metrics": metrics, "nonfinite": bad} if bad else {"metrics": metrics}


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line in one write; a line that was cut off before is ended first."""
    line = json.dumps(record, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = "\n" + line
        os.write(handle, line.encode())
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Metrics:
    """What a metrics.jsonl says: the records of the course that counts, in order, and how many were left out.

    superseded: records of a course that a resumed run did not go on from. broken: lines that are no JSON
    object, as a power cut leaves one.
    """

    records: tuple[dict[str, Any], ...]
    superseded: int = 0
    broken: int = 0

    def course(self, name: str) -> list[float]:
        """A metric over the epochs; NaN where it is missing or was not finite."""
        return [_back(record, name) for record in self.records]


def read_metrics(path: str | os.PathLike[str]) -> Metrics:
    """Read a metrics.jsonl; raises DataError where the file cannot be read or holds no record at all."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'cannot be read'}") from error
    records: list[dict[str, Any]] = []
    superseded = broken = 0
    for line in filter(str.strip, text.splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"step", "resumed_at"} & set(record):
            broken += 1
        elif "resumed_at" in record:
            kept = [entry for entry in records if entry["step"] <= record["resumed_at"]]
            superseded += len(records) - len(kept)
            records = kept
        else:
            records.append(record)
    if broken and not records and not superseded:
        raise DataError(f"{path}: holds no metrics, but {broken} lines of something else")
    return Metrics(tuple(records), superseded, broken)


def _back(record: Mapping[str, Any], name: str) -> float:
    value = record.get("metrics", {}).get(name)
    return float(record.get("nonfinite", {}).get(name, "nan")) if value is None else float(value)


def _number(value: Tensor | float) -> float:
    return float(value)
