"""Checkpoints: written whole or not at all, read without running code, refused with one line."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor, nn

from hopdeq_lwpf.data import DataError
from hopdeq_lwpf.data.tensors import Kind
from hopdeq_lwpf.storage import read_structure, write_structure
from hopdeq_lwpf.training.spec import differences

FORMAT = "hopdeq_lwpf.training"
# Format 1 was a file of torch.save.
KIND = Kind("training checkpoint", 2, "hopdeq_lwpf.training.load_weights(path, model)")
ADVICE = "take best.ckpt or start again without resume"
# What a checkpoint of a Trainer holds, whatever it trains.
PARTS = {
    "epoch": int,
    "global_step": int,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
LAST, BEST = "last.ckpt", "best.ckpt"
HIGHER = ("accuracy", "auc")  # metrics of which more is better


class CheckpointError(DataError):
    """A checkpoint that cannot be used, in one line that names the file and what to do."""


class WholeFiles(CheckpointIO):
    """Checkpoints as safetensors files, for `Trainer(plugins=[WholeFiles()])`; reading one runs no code.

    Each is written beside the old file and renamed, so that a killed process leaves one whole file. It holds
    tensors, numbers, strings, lists, tuples and dicts; TypeError for a callback whose state holds anything else.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write, flush to the disk, rename."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_structure(path, KIND, checkpoint)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What was written, on the CPU unless map_location is a device; never more than tensors and plain values.

        Raises CheckpointError for a file that is missing, cut off, or no checkpoint.
        """
        return _load(Path(path), "cpu" if map_location is None else map_location)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove the file, if it is there."""
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Saves last.ckpt at the start and after each epoch, best.ckpt whenever the monitored metric improves.

    folder: of the two files. settings: kept in each checkpoint, for `check_settings`. monitor: a metric;
    highest is best for accuracy and auc, lowest for others. A NaN is never best. Without the metric there is
    no best.ckpt.
    Each file resumes a run exactly (`Trainer.fit(ckpt_path=...)`) together with `SeededEpochs`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], monitor: str = "val/loss"
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.settings = dict(settings)
        self.monitor = monitor
        self.best: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._save(trainer, LAST)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        improved = value is not None and self._better(float(value))
        if improved:
            self.best = float(value)  # type: ignore[arg-type]
            self._save(trainer, BEST)
        self._save(trainer, LAST)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Marks the checkpoint as one of ours, with the settings of the run."""
        checkpoint[FORMAT] = {"settings": self.settings}

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the best value so far, if the same metric is asked for."""
        if state_dict["monitor"] == self.monitor:
            self.best = state_dict["best"]

    def _better(self, value: float) -> bool:
        if math.isnan(value) or self.best is None:
            return not math.isnan(value)
        higher = self.monitor.rsplit("/", 1)[-1] in HIGHER
        return value > self.best if higher else value < self.best

    def _save(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(str(self.folder / name))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint of `Checkpoints`, on the CPU; runs no code of the file.

    Raises CheckpointError for a file that is missing, cut off, of another format, or not one of ours.
    """
    file = Path(path)
    content = _load(file, "cpu")
    mark = content.get(FORMAT)
    if not isinstance(mark, dict) or not isinstance(mark.get("settings"), dict):
        raise CheckpointError(f"{file}: is no checkpoint of hopdeq-lwpf train; name one that it wrote")
    wrong = [name for name, kind in PARTS.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise CheckpointError(f"{file}: is damaged: it has no {', '.join(wrong)} of a training; {ADVICE}")
    return content


def check_settings(
    path: str | os.PathLike[str], checkpoint: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """CheckpointError that names each setting which differs from `now` (`TrainSpec.as_dict()`)."""
    changed = differences(checkpoint[FORMAT]["settings"], now)
    if changed:
        raise CheckpointError(
            f"{path}: cannot resume with other settings: {'; '.join(changed)}. Use the settings of config.yaml "
            "beside it, or another out folder"
        )


def check_weights(path: str | os.PathLike[str], checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """CheckpointError that names the first weight which does not fit `module`."""
    held, needed = checkpoint["state_dict"], module.state_dict()
    for name in sorted({*held, *needed}):
        if name not in held or name not in needed:
            where = "the model" if name not in needed else "the checkpoint"
            raise CheckpointError(
                f"{path}: is of another model: {where} has no {name!r}; build the model as it was trained"
            )
        shapes = tuple(
            tuple(entry.shape) if isinstance(entry, Tensor) else None for entry in (held[name], needed[name])
        )
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{path}: is of another model: {name!r} is {shapes[0]}, needs {shapes[1]}; build the model as it was "
                "trained"
            )


def load_weights(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put the weights of a checkpoint of `hopdeq-lwpf train` into the model it was trained as; returns the model.

    Raises CheckpointError for a file that is no such checkpoint, or of another model.
    """
    checkpoint = read_checkpoint(path)
    prefix = "model."
    weights = {
        name.removeprefix(prefix): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    check_weights(path, {"state_dict": weights}, model)
    model.load_state_dict(weights)
    return model


def remove_leftovers(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Remove what killed processes left half-written beside the files of these names; nobody may be writing them."""
    for name in map(Path, names):
        for path in Path(folder).glob(f".{name.stem}-*{name.suffix}"):
            path.unlink(missing_ok=True)


def _load(path: Path, device: Any) -> dict[str, Any]:
    """The content of a checkpoint, which has at least weights."""
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; there is nothing to resume")
    try:
        content = read_structure(path, KIND, device, own=True)
    except DataError as error:
        if _of_torch(path):
            raise CheckpointError(
                f"{path}: was written by torch.save, and reading such a file can run code; checkpoints of this version "
                f"are safetensors files (format {KIND.version}). Start again without resume, or go on with the version "
                "that wrote it"
            ) from error
        advice = f"; {ADVICE}" if "damaged" in str(error) else ""
        raise CheckpointError(f"{error}{advice}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path}: is damaged: it has no weights; {ADVICE}")
    return content


def _of_torch(path: Path) -> bool:
    """Whether a file begins as those of torch.save do: a zip archive, or a pickle as before torch 1.6."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        begins = file.read(9)
    # The length of its header, with which a safetensors file begins, may look like either; a brace follows it.
    return begins.startswith((b"PK\x03\x04", b"\x80")) and begins[8:] != b"{"
