"""One training run from its settings: builds, trains, records, resumes."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn

from hopdeq_lwpf._checks import SpecError
from hopdeq_lwpf.data import replacing
from hopdeq_lwpf.training.checkpoints import (
    BEST,
    LAST,
    Checkpoints,
    WholeFiles,
    check_settings,
    check_weights,
    read_checkpoint,
    remove_leftovers,
)
from hopdeq_lwpf.training.convergence import ConvergenceMonitor
from hopdeq_lwpf.training.datasets import build_data
from hopdeq_lwpf.training.learner import Learner, Learning
from hopdeq_lwpf.training.metrics import Metrics, MetricsFile, read_metrics
from hopdeq_lwpf.training.monitors import GradientMonitor, SolutionMonitor, SpectrumMonitor
from hopdeq_lwpf.training.networks import build_network
from hopdeq_lwpf.training.progress import EpochLines
from hopdeq_lwpf.training.seeding import SeededEpochs, seed_everything
from hopdeq_lwpf.training.spec import TrainSpec

METRICS, CONFIG, RESIDUALS = "metrics.jsonl", "config.yaml", "residuals.npz"
# Of Lightning's advice this does not apply: workers and a logging interval suit large data; a checkpoint folder
# that is not empty is what resuming needs; scores are reduced over processes before they are logged; one process
# on a machine with an accelerator was asked for; data may come without a validation set; and what Lightning
# calls of torch's pytrees is its own affair.
ADVICE = (
    r".*does not have many workers",
    r".*smaller than the logging interval",
    r"Checkpoint directory .* exists and is not empty",
    r".*recommended to use `self\.log\(.*sync_dist=True\)`",
    r".*available but not used",
    r".*no `val_dataloader`",
    r".*isinstance\(treespec, LeafSpec\)",
)
LOGGER_PACKAGES = {"csv": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


@dataclass(frozen=True)
class Trained:
    """What a run gives: the learner with its last weights, what was recorded, and the files, by name."""

    learner: Learner
    metrics: Metrics
    files: dict[str, Path]

    @property
    def model(self) -> nn.Module:
        """The trained model."""
        return self.learner.model


def train(
    spec: TrainSpec,
    *,
    model: nn.Module | None = None,
    data: LightningDataModule | None = None,
    callbacks: tuple[Callback, ...] = (),
    console: Console | None = None,
) -> Trained:
    """Train as the settings say; the folder `spec.out` then holds metrics.jsonl, config.yaml, last.ckpt, best.ckpt.

    model, data: instead of those that the settings name. callbacks: more of them. console: where progress is
    printed; None prints nothing.
    With the same settings, threads and machine every run gives the same numbers, also one that was killed at any
    time and resumed (`resume=True`), once or often: it goes on from the end of the last whole epoch.
    KeyboardInterrupt (Ctrl-C) comes out as itself and leaves last.ckpt, too.

    Raises SpecError for settings that make no sense and a folder that holds another run, CheckpointError for a
    checkpoint that cannot be resumed.
    """
    out = Path(spec.out)
    checkpoint = _checkpoint(spec, out)
    loggers = _loggers(spec, out)
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    try:
        seed_everything(spec.seed)
        learner = Learner(_built("model", spec, model), _learning(spec))
        module = _built("data", spec, data)
        if checkpoint is not None:
            check_weights(out / LAST, checkpoint, learner)
        with _quiet():
            trainer = _trainer(spec, out, loggers, callbacks, console)
            files = _begin(spec, out)
            _fit(trainer, learner, module, str(out / LAST) if checkpoint is not None else None)
    finally:
        torch.set_num_threads(threads)
    return Trained(learner, read_metrics(files["metrics"]), {k: v for k, v in files.items() if v.exists()})


def _checkpoint(spec: TrainSpec, out: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from; None at the beginning."""
    if spec.resume:
        checkpoint = read_checkpoint(out / LAST)
        check_settings(out / LAST, checkpoint, spec.as_dict())
        return checkpoint
    if out.exists() and not out.is_dir():
        raise SpecError(f"out {spec.out!r} is a file, needs a folder")
    if is_first_process() and ((out / LAST).exists() or (out / METRICS).exists()):
        raise SpecError(
            f"out {spec.out!r} holds a run already: go on with it (--resume true) or name another folder"
        )
    return None


def _built(kind: str, spec: TrainSpec, given: Any) -> Any:
    """What was given, or what the settings name; a mistake in them, or a missing package, is a SpecError."""
    if given is not None:
        return given
    try:
        return build_network(spec.model) if kind == "model" else build_data(spec.data, spec.seed)
    except (TypeError, ValueError, ImportError) as error:
        raise SpecError(f"{kind}: {error}") from error


def _learning(spec: TrainSpec) -> Learning:
    return Learning(**{entry.name: getattr(spec, entry.name) for entry in fields(Learning)})


def _begin(spec: TrainSpec, out: Path) -> dict[str, Path]:
    out.mkdir(parents=True, exist_ok=True)
    files = {"metrics": out / METRICS, "config": out / CONFIG, "last": out / LAST, "best": out / BEST}
    if spec.iterations is not None:
        files["residuals"] = out / RESIDUALS
    if is_first_process():
        remove_leftovers(out, (CONFIG, LAST, BEST, RESIDUALS))
        # The settings of the run as a whole, which was not resumed when it began.
        settings = {**spec.as_dict(), "resume": False}
        with replacing(files["config"]) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return files


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the first of a distributed one, which writes the files."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def _trainer(
    spec: TrainSpec, out: Path, loggers: list[Any], callbacks: tuple[Callback, ...], console: Console | None
) -> Trainer:
    own: list[Callback] = [SeededEpochs(spec.seed)]
    if spec.diagnostics:
        own += [SolutionMonitor(), GradientMonitor()]
    if spec.spectrum_every:
        own.append(SpectrumMonitor(spec.spectrum_every))
    if spec.iterations is not None:
        own.append(ConvergenceMonitor(**spec.iterations, path=out / RESIDUALS))
    # The file before the checkpoint: a run killed between the two repeats an epoch instead of losing its line.
    last: list[Callback] = [
        MetricsFile(out / METRICS),
        Checkpoints(out, spec.as_dict(), spec.monitor),
        *([EpochLines(console)] if console is not None else []),
    ]
    options: dict[str, Any] = dict(
        accelerator=spec.accelerator,
        devices=spec.devices,
        precision=spec.precision,
        max_epochs=spec.epochs,
        accumulate_grad_batches=spec.accumulate,
        gradient_clip_val=spec.clip,
        limit_train_batches=spec.limit_batches,
        callbacks=[*own, *callbacks, *last],
        logger=loggers or False,
        plugins=[WholeFiles()],
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    try:
        return Trainer(**options)
    except (MisconfigurationException, ModuleNotFoundError, ValueError) as error:
        # No accelerator of this kind here, or one that has not the precision.
        raise SpecError(f"accelerator {spec.accelerator!r}, precision {spec.precision!r}: {error}") from error


def _fit(trainer: Trainer, learner: Learner, data: Any, checkpoint: str | None) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(learner, datamodule=data, ckpt_path=checkpoint)
    except SystemExit as error:
        # Lightning turns Ctrl-C into an exit of the process; whoever called may have other plans.
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            raise KeyboardInterrupt from error
        raise
    finally:
        # ... and ignores further ones from then on.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _loggers(spec: TrainSpec, out: Path) -> list[Any]:
    loggers: list[Any] = []
    for name in spec.loggers:
        packages = LOGGER_PACKAGES[name]
        if packages and not any(find_spec(package) for package in packages):
            raise SpecError(f"loggers: {name!r} needs a package that is missing: pip install {packages[0]}")
        # Imported one by one: each pulls in its package.
        if name == "csv":
            from lightning.pytorch.loggers import CSVLogger

            loggers.append(CSVLogger(str(out), name="csv"))  # a version of its own for each start
        elif name == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(str(out), name="tensorboard"))
        else:
            from lightning.pytorch.loggers import WandbLogger

            loggers.append(WandbLogger(save_dir=str(out), name=out.name))
    return loggers


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on the machine and its advice that does not apply."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for advice in ADVICE:
                warnings.filterwarnings("ignore", message=advice)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
