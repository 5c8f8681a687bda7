"""Progress of a training: one line an epoch for terminal and log file, on a terminal a bar in between."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SCORES = ("loss", "accuracy", "auc")


class EpochLines(Checkpoint):
    """Prints losses and scores of each epoch, the worst residual and the lowest share converged.

    console: where to; on a terminal a bar shows the batches of the current epoch. (A Lightning `Checkpoint`
    because those run last, when all metrics are there.)
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._bar: Progress | None = None
        self._start = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.console.is_terminal or not trainer.is_global_zero:
            return
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._bar.start()
        total = trainer.num_training_batches
        self._bar.add_task("", total=total if math.isfinite(total) else None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            head = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, step {trainer.global_step}"
            line = f"{head}, {time.monotonic() - self._start:.0f} s" + summary(metrics)
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def summary(metrics: dict[str, float]) -> str:
    """', train loss 0.51, ...': scores by stage, then the worst layer of each stage in two numbers."""
    text = ""
    for stage in ("train", "val"):
        own = {name: metrics[f"{stage}/{name}"] for name in SCORES if f"{stage}/{name}" in metrics}
        layers = {name: value for name, value in metrics.items() if name.startswith(f"{stage}/")}
        shares = [value for name, value in layers.items() if name.endswith("/converged")]
        worst = [value for name, value in layers.items() if name.endswith("/residual_max")]
        parts = [f"{name} {value:.4g}" for name, value in own.items()]
        if shares:
            parts.append(f"converged {100 * min(shares):.1f} %")
        if worst:
            parts.append(f"worst residual {max(worst):.1e}")
        if parts:
            text += f"; {stage}: " + ", ".join(parts)
    return text
