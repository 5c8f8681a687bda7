"""What a training run is asked to do. Imports no torch, so that the command line answers at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hopdeq_lwpf._checks import SpecError, choice, forms, number, option, whole

LOSSES = ("cross_entropy", "squared_error", "binary", "mse")
OPTIMIZERS = ("adamw", "adam", "sgd", "madam")
SCHEDULES = ("constant", "cosine", "linear")
LOGGERS = ("csv", "tensorboard", "wandb")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "bf16-true")

# Settings that a resumed run may change: they do not enter the numbers, or only say where a run ends.
FREE = (
    "epochs", "monitor", "diagnostics", "spectrum_every", "iterations", "loggers", "threads", "resume", "out",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSpec:
    """Settings of `hopdeq-lwpf train`; every field is an option and a key of the YAML file.

    The defaults of loss to clip are those of the published bit-pattern study (AdamW 1e-3, weight decay 0.01,
    gradients clipped to norm 1). Raises SpecError for a value that makes no sense.
    """

    model: dict[str, Any] = option(
        {"model": "equilibrium"},
        "the network: key 'model' with its name, and its options (--model.NAME VALUE)",
    )
    data: dict[str, Any] = option(
        {"data": "digits"}, "the data: key 'data' with its name, and its options (--data.NAME VALUE)"
    )
    loss: str = option("cross_entropy", f"one of {', '.join(LOSSES)}")
    optimizer: str = option("adamw", f"one of {', '.join(OPTIMIZERS)}")
    learning_rate: float = option(1e-3, "highest learning rate")
    weight_decay: float = option(0.01, "weight decay")
    clip: float | None = option(1.0, "gradients longer than this are scaled to it; null: never")
    schedule: str = option("constant", f"of the learning rate, one of {', '.join(SCHEDULES)}")
    final_rate: float = option(0.0, "where a schedule ends, as a share of learning_rate")
    warmup: int = option(0, "steps in which the learning rate grows linearly from 0")
    epochs: int = option(10, "how many passes through the data")
    accumulate: int = option(1, "batches whose gradients are averaged for one step")
    limit_batches: int | None = option(None, "training batches an epoch; null: all")
    monitor: str = option(
        "val/loss", "metric of which best.ckpt is best: highest accuracy or auc, else lowest"
    )
    diagnostics: bool = option(True, "record residual, steps, energy, gradients of the equilibrium layers")
    spectrum_every: int = option(0, "epochs between two spectral radii of one batch; 0: never")
    iterations: dict[str, Any] | None = option(
        None, "count the iterations to a residual: {budget: 40, every: 1, tolerance: 1.0e-4}; null: never"
    )
    loggers: tuple[str, ...] = option((), f"beside metrics.jsonl, any of {', '.join(LOGGERS)}")
    precision: str = option("32-true", f"one of {', '.join(PRECISIONS)}")
    accelerator: str = option("cpu", f"one of {', '.join(ACCELERATORS)}")
    devices: int = option(1, "how many devices of that kind")
    threads: int = option(1, "threads of torch; a resumed run is exact for the same number")
    seed: int = option(0, "of weights, data order, dropout and noise")
    resume: bool = option(False, "go on from last.ckpt in the folder of the results")
    out: str = option("results/train", "folder of the results")

    def __post_init__(self) -> None:
        forms(self, free=("model", "data"))
        object.__setattr__(self, "loggers", tuple(self.loggers))
        for name, key in (("model", "model"), ("data", "data")):
            object.__setattr__(self, name, _mapping(name, getattr(self, name), key))
        choices = (("loss", LOSSES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES))
        for name, allowed in (*choices, ("precision", PRECISIONS), ("accelerator", ACCELERATORS)):
            choice(name, getattr(self, name), allowed)
        for logger in self.loggers:
            choice("loggers", logger, LOGGERS)
        if len(set(self.loggers)) != len(self.loggers):
            raise SpecError(f"loggers names a value twice: {list(self.loggers)}")
        number("learning_rate", self.learning_rate, above=0)
        number("weight_decay", self.weight_decay, least=0)
        number("final_rate", self.final_rate, least=0, most=1)
        if self.clip is not None:
            number("clip", self.clip, above=0)
        if self.limit_batches is not None:
            whole("limit_batches", self.limit_batches, least=1)
        if self.iterations is not None:
            object.__setattr__(self, "iterations", _iterations(self.iterations))
        for name in ("epochs", "accumulate", "devices", "threads"):
            whole(name, getattr(self, name), least=1)
        for name in ("warmup", "spectrum_every", "seed"):
            whole(name, getattr(self, name), least=0)
        if not self.out:
            raise SpecError("out is empty: name a folder for the results")
        if "/" not in self.monitor:
            raise SpecError(f"monitor must be the name of a metric such as 'val/loss', got {self.monitor!r}")

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name, lists instead of tuples: what YAML and JSON write."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """'NAME is B in the checkpoint and N now' for each setting that a resumed run may not change.

    `before`, `now`: `TrainSpec.as_dict()`. The epochs are free where the learning rate does not depend on them.
    """
    free = [name for name in FREE if name != "epochs" or now.get("schedule") == "constant"]
    flat_before, flat_now = _flat(before), _flat(now)
    names = [name for name in {**flat_before, **flat_now} if name.split(".")[0] not in free]
    return [
        f"{name} is {flat_before.get(name, 'not set')!r} in the checkpoint and "
        f"{flat_now.get(name, 'not set')!r} now"
        for name in names
        if flat_before.get(name, _ABSENT) != flat_now.get(name, _ABSENT)
    ]


_ABSENT = object()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _iterations(given: object) -> dict[str, Any]:
    """The settings of the count, all of them."""
    known: dict[str, Any] = {"budget": 40, "every": 1, "tolerance": 1e-4}
    if not isinstance(given, Mapping):
        raise SpecError(f"iterations must be a mapping with any of {list(known)}, or null, got {given!r}")
    for name in given:
        choice("iterations", name, tuple(known))
    found = {**known, **given}
    whole("iterations.budget", found["budget"], least=2)
    whole("iterations.every", found["every"], least=1)
    number("iterations.tolerance", found["tolerance"], above=0)
    return found


def _mapping(name: str, value: object, key: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {key: value}
    if not isinstance(value, Mapping):
        raise SpecError(f"{name} must be a name or a mapping with the key {key!r}, got {value!r}")
    if not isinstance(value.get(key), str):
        raise SpecError(f"{name} needs the key {key!r} with a name, got the keys {sorted(map(str, value))}")
    return {str(option): entry for option, entry in value.items()}
