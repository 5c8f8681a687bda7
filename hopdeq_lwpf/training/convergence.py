"""A callback that counts the iterations of equilibrium layers to a tolerance, and keeps their residuals."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from hopdeq_lwpf._types import Solution, plain
from hopdeq_lwpf.data import replacing
from hopdeq_lwpf.diagnostics.iterations import TOLERANCE, iterations_to
from hopdeq_lwpf.solvers import Equilibrium, Termination, fixed_point
from hopdeq_lwpf.solvers.base import check_count
from hopdeq_lwpf.training.monitors import same_randomness

OUTPUTS = ("return_solution", "read_out", "index")  # arguments of a layer that say nothing about the problem


class ConvergenceMonitor(Callback):
    """Iterations to a relative residual, over all problems of the validation or test set, every n epochs.

    Each `Equilibrium` is solved once more for every batch, by its own solver but without early stopping, from its own
    start, every call of it. Logs STAGE/LAYER/NAME, stage val or test, with LAYER "model" where the model is the layer:
        iterations: mean number of updates until the residual is first below the tolerance, of those that get there;
        iterations_published: mean of the count of Goemaere et al. 2024 (see `diagnostics.iterations_to`);
        not_converged: share of problems that did not get there within the budget.
    budget: evaluations of f; 40 is theirs for three layers (80 for five, 120 for seven, twice that with damping 0.5).
    every: epochs between two counts, the first at the end of epoch `every`; in the last epoch and in a test always.
    `residuals` then holds the relative residuals of the last count by layer, (budget, problems) on the CPU, NaN after
    an exact solution: what `plots.residual_heatmap` draws. path: an .npz file that they are written to as well.
    """

    def __init__(
        self,
        *,
        tolerance: float = TOLERANCE,
        budget: int = 40,
        every: int = 1,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        check_count("budget", budget, 2)
        check_count("every", every, 1)
        if not tolerance > 0:
            raise ValueError(f"tolerance must be > 0, got {tolerance!r}")
        self.tolerance = tolerance
        self.budget = budget
        self.every = every
        self.path = path
        self.residuals: dict[str, Tensor] = {}
        self._parts: dict[str, list[Tensor]] = {}
        self._inputs: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._layers: dict[str, Equilibrium] = {}
        self._handles: list[Any] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == trainer.max_epochs:
            self._begin(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._count(pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._count(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("val", trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("test", trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    def _begin(self, pl_module: LightningModule) -> None:
        self._let_go()
        model = getattr(pl_module, "model", pl_module)
        modules = {name or "model": module for name, module in model.named_modules()}
        self._layers = {name: m for name, m in modules.items() if isinstance(m, Equilibrium)}
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._watch(name), with_kwargs=True))

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs, self._parts = [], {}, {}

    def _watch(self, name: str) -> Callable[..., None]:
        def watch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            # What a call solves, without what it returns.
            solved = {key: value for key, value in keywords.items() if key not in OUTPUTS}
            self._inputs.setdefault(name, []).append((arguments, solved))

        return watch

    def _count(self, pl_module: LightningModule) -> None:
        inputs, self._inputs = self._inputs, {}
        for name, calls in inputs.items():
            for arguments, keywords in calls:
                with same_randomness(pl_module), torch.no_grad():
                    found = self._residuals(self._layers[name], *arguments, **keywords)
                self._parts.setdefault(name, []).append(found)

    def _residuals(self, layer: Equilibrium, *arguments: Any, **keywords: Any) -> Tensor:
        """(budget, problems) of one batch, NaN where a problem has stopped."""
        # Nothing stops before an exact solution; the last step makes evaluation number `budget`.
        stop = Termination(rtol=0.0, atol=0.0, max_steps=self.budget - 1)
        context, z0 = layer.problem(*arguments, **keywords)
        solution: Solution = fixed_point(layer.f, context, z0, solver=layer.solver, stop=stop, trace=True)
        assert solution.trace is not None
        residual = plain(solution.trace.residual).reshape(solution.trace.residual.shape[0], -1).cpu()
        short = self.budget - residual.shape[0]  # all problems may have stopped early
        return torch.nn.functional.pad(residual, (0, 0, 0, short), value=math.nan)

    def _end(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._parts:
            self.residuals = {name: torch.cat(parts, 1) for name, parts in self._parts.items()}
            if self.path is not None and trainer.is_global_zero:
                arrays: dict[str, Any] = {name: found.numpy() for name, found in self.residuals.items()}
                with replacing(Path(self.path)) as temporary, temporary.open("wb") as file:
                    np.savez_compressed(file, **arrays)
        for name in self._parts:
            for key, value in self._means(self.residuals[name]).items():
                pl_module.log(f"{stage}/{name}/{key}", value, on_epoch=True, on_step=False)
        self._let_go()

    def _means(self, residual: Tensor) -> dict[str, float]:
        exact = iterations_to(residual, self.tolerance)
        there = exact[~exact.isnan()]
        published = iterations_to(residual, self.tolerance, as_published=True)
        return {
            "iterations": float(there.mean()) if len(there) else math.nan,
            "iterations_published": float(published.mean()),
            "not_converged": float(exact.isnan().double().mean()),
        }
