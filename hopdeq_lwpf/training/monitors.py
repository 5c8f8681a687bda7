"""Callbacks that record how the equilibrium layers fare while a model learns.

All find every module with a `last_solution` by its name, and log one number an epoch for each of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hopdeq_lwpf._types import Result, Solution
from hopdeq_lwpf.solvers import Equilibrium
from hopdeq_lwpf.solvers.base import check_count
from hopdeq_lwpf.training.seeding import generators


def equilibrium_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that keep a `last_solution`, by qualified name; "model" where it is the model itself.

    Of modules inside each other only the outermost: a Hopfield layer says what the equilibrium within it did. A model
    that passes on the Solution of a layer, and says so by `passes_on_solution`, is not one itself.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(outer == "model" or name.startswith(f"{outer}.") for outer in layers)
        passed = getattr(module, "passes_on_solution", False)
        if not inside and not passed and hasattr(module, "last_solution"):
            layers[name or "model"] = module
    return layers


class SolutionMonitor(Callback):
    """Residual, steps and share converged of forward and adjoint solves; energy and support where they are known.

    Logs STAGE/LAYER/NAME with the stages train and val, over all problems of the epoch:
        residual, residual_max: mean and largest relative residual, of those that are finite.
        steps, steps_max; evaluations: mean of the evaluations of f.
        converged: share of problems with result CONVERGED. nonfinite: share with result NONFINITE.
        adjoint_residual_max, adjoint_steps, adjoint_converged: of the backward solve (`Solution.adjoint`).
        energy, support: means, where the Solution has them (`Recall`); in the stage val also of layers that have
        an `energy` or an `association_matrix`, of which support counts the weights above 0, and forgotten is the
        share of problems without any (empty bags among them): what forgets everything recalls 0 and does not learn.
    Of a layer that is called several times in a batch it sees the last call; of a distributed run the problems
    of the first process.
    every: batches between two looks; 1 is all. A look keeps a few (B,) tensors and waits for no device.
    """

    def __init__(self, every: int = 1) -> None:
        check_count("every", every, 1)
        self.every = every
        self._layers: dict[str, nn.Module] = {}
        self._called: set[str] = set()
        self._courses: dict[str, _Course] = {}
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = equilibrium_layers(getattr(pl_module, "model", pl_module))
        for name, module in self._layers.items():
            # What was not called in this batch holds the Solution of another one.
            self._handles.append(module.register_forward_hook(lambda *_, name=name: self._called.add(name)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _remove(self._handles)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear("train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear("val")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look("train", batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._look("val", batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log("train", pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log("val", pl_module)

    def _clear(self, stage: str) -> None:
        self._courses = {key: course for key, course in self._courses.items() if course.stage != stage}
        self._called.clear()

    def _look(self, stage: str, batch_idx: int) -> None:
        called, self._called = self._called, set()
        if batch_idx % self.every:
            return
        for name in called:
            module = self._layers[name]
            solution = module.last_solution
            if isinstance(solution, Solution):
                course = self._courses.setdefault(f"{stage}/{name}", _Course(stage))
                course.add(solution, module if stage == "val" else None)

    def _log(self, stage: str, pl_module: LightningModule) -> None:
        for key, course in sorted(self._courses.items()):
            if course.stage == stage:
                for name, value in course.means().items():
                    pl_module.log(f"{key}/{name}", value, on_epoch=True, on_step=False)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


# What is kept of a Solution by the metrics that are made from it; a mean has the name itself.
MEANS = ("residual", "steps", "evaluations", "energy", "support", "adjoint_steps")
MAXIMA = {"residual": "residual_max", "steps": "steps_max", "adjoint_residual": "adjoint_residual_max"}
SHARES: dict[str, dict[str, int]] = {
    "result": {"converged": Result.CONVERGED, "nonfinite": Result.NONFINITE},
    "adjoint_result": {"adjoint_converged": Result.CONVERGED},
    "support": {"forgotten": 0},
}


class _Course:
    """Sums and maxima over an epoch, as tensors; what is added is first kept, since small sums cost more."""

    FOLD = 64  # tensors: few enough to need no memory

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.kept: dict[str, list[Tensor]] = defaultdict(list)
        self.totals: dict[str, list[tuple[Tensor, int | Tensor]]] = defaultdict(list)
        self.tops: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, solution: Solution, module: nn.Module | None = None) -> None:
        parts: dict[str, Any] = {
            name: getattr(solution, name) for name in ("residual", "steps", "evaluations", "result")
        }
        for name in ("energy", "support"):
            parts[name] = getattr(solution, name, None)
            if parts[name] is None and module is not None:
                parts[name] = _asked(module, name)
        if solution.adjoint is not None:
            for name in ("result", "residual", "steps"):
                parts[f"adjoint_{name}"] = getattr(solution.adjoint, name)
        for name, values in parts.items():
            if isinstance(values, Tensor):
                self.kept[name].append(values.detach().reshape(-1))
                if len(self.kept[name]) >= self.FOLD:
                    self._fold(name)

    def _fold(self, name: str) -> None:
        values = torch.cat(self.kept.pop(name))
        for share, code in SHARES.get(name, {}).items():
            self.totals[share].append(((values == int(code)).sum().double(), len(values)))
        if name in MEANS:
            finite = values.isfinite()
            self.totals[name].append((values.double().where(finite, 0.0).sum(), finite.sum()))
        if name in MAXIMA and len(values):
            top = values.double()
            self.tops[MAXIMA[name]].append(top.where(top.isfinite(), -math.inf).max())

    def means(self) -> dict[str, float]:
        """Of everything that was added; NaN where no value was finite."""
        for name in list(self.kept):
            self._fold(name)
        found = {}
        for name, parts in self.totals.items():
            total, count = (sum(float(part) for part in column) for column in zip(*parts, strict=True))
            found[name] = total / count if count else math.nan
        for name, tops in self.tops.items():
            top = max(float(part) for part in tops)
            found[name] = top if math.isfinite(top) else math.nan
        return dict(sorted(found.items()))


def _asked(module: nn.Module, name: str) -> Tensor | None:
    """What a layer computes when it is asked for: the energy, the number of weights above 0."""
    value = getattr(module, "energy" if name == "energy" else "association_matrix", None)
    if not isinstance(value, Tensor):
        return None
    if name == "energy":
        return value
    support = (value > 0).sum(-1)
    return support[~value.isnan().any(-1)]  # a state that met NaN has forgotten nothing


class GradientMonitor(Callback):
    """Norms of gradients, before clipping; means over the steps of an epoch.

    Logs train/gradient_norm and gradient_norm_max of all parameters together, and for each equilibrium layer
    train/LAYER/query_gradient: |dL/dx| of its first floating-point input that requires grad, over the batch; of a
    layer with a `learned_query` that of this parameter. It is absent where nothing requires grad (as in a first
    layer), and 0 where the gradient to the query is lost. Means are over finite norms; nonfinite_gradients is the
    share of steps with a NaN or inf in a gradient.
    """

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._queries: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []
        self._learned: dict[str, nn.Parameter] = {}
        self._scaler: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        layers = equilibrium_layers(getattr(pl_module, "model", pl_module))
        self._learned = {}
        for name, module in layers.items():
            learned = getattr(module, "learned_query", None)
            if isinstance(learned, nn.Parameter) and learned.requires_grad:
                self._learned[name] = learned
            else:
                self._handles.append(module.register_forward_pre_hook(self._watch(name), with_kwargs=True))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _remove(self._handles)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._norms, self._queries = [], {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            parts = torch._foreach_norm(gradients)
            self._norms.append(torch.linalg.vector_norm(torch.stack([part.float() for part in parts])))
        for name, learned in self._learned.items():
            gradient = learned.new_zeros(1) if learned.grad is None else learned.grad
            norm = torch.linalg.vector_norm(gradient.float())
            self._queries.setdefault(name, []).append(norm)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {f"train/{name}/query_gradient": _mean(norms) for name, norms in self._queries.items()}
        if self._norms:
            norms = torch.stack(self._norms)
            finite = norms[norms.isfinite()]
            values["train/gradient_norm"] = _mean(self._norms)
            values["train/gradient_norm_max"] = float(finite.max()) if len(finite) else math.nan
            values["train/nonfinite_gradients"] = 1 - len(finite) / len(norms)
        for name, value in values.items():
            pl_module.log(name, value, on_epoch=True, on_step=False)

    def _watch(self, name: str) -> Callable[..., None]:
        def watch(module: nn.Module, arguments: Any, keywords: Any) -> None:
            if not module.training or not torch.is_grad_enabled():
                return
            for leaf in pytree.tree_leaves((arguments, keywords)):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
                    leaf.register_hook(keep)
                    return

        def keep(gradient: Tensor) -> None:
            norm = torch.linalg.vector_norm(gradient.detach().float())
            if self._scaler is not None:  # of float16, which multiplies the loss
                norm = norm / self._scaler.get_scale()
            self._queries.setdefault(name, []).append(norm)

        return watch


def _mean(norms: list[Tensor]) -> float:
    values = torch.stack(norms).double()
    values = values[values.isfinite()]
    return float(values.mean()) if len(values) else math.nan


class SpectrumMonitor(Callback):
    """Spectral radius and energy at the equilibria of one validation batch, every n epochs.

    Logs val/LAYER/spectral_radius (median over the problems), spectral_radius_max, unstable (share with radius
    1 or more) and energy (mean, where f has one and the Solution does not say it) for every `Equilibrium`, also
    inside of other layers, that is called with a batch.
    every: epochs between two measurements. subspace: products with the Jacobian at most, each as much as one
    step of the solver and its backward pass. What is drawn in between leaves the run as it was.
    """

    def __init__(self, every: int = 1, *, subspace: int = 40) -> None:
        check_count("every", every, 1)
        check_count("subspace", subspace, 1)
        self.every = every
        self.subspace = subspace
        self._inputs: dict[str, Any] = {}
        self._layers: dict[str, Equilibrium] = {}
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = getattr(pl_module, "model", pl_module)
        modules = {name or "model": module for name, module in model.named_modules()}
        self._layers = {name: m for name, m in modules.items() if isinstance(m, Equilibrium)}

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0 and trainer.current_epoch % self.every == 0:
            for name, module in self._layers.items():
                self._handles.append(module.register_forward_pre_hook(self._watch(name), with_kwargs=True))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._handles:
            return
        self.teardown(trainer, pl_module, "validate")
        with same_randomness(pl_module):
            for name, x in self._inputs.items():
                for key, value in self._measure(self._layers[name], x).items():
                    pl_module.log(f"val/{name}/{key}", value, on_epoch=True, on_step=False, batch_size=1)
        self._inputs = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _remove(self._handles)

    def _watch(self, name: str) -> Callable[..., None]:
        def watch(module: nn.Module, arguments: Any, keywords: Any) -> None:
            if arguments:
                self._inputs[name] = arguments[0]

        return watch

    def _measure(self, module: Equilibrium, x: Any) -> dict[str, float]:
        from hopdeq_lwpf.diagnostics import spectral_radius

        f: Any = module.f
        solution = module.last_solution
        if solution is None:
            return {}
        # Validation runs in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False):
            state, x = (pytree.tree_map(_usable, part) for part in (solution.state, x))
            with torch.no_grad():
                context = f.prepare(x) if hasattr(f, "prepare") else x
            radius = spectral_radius(f, state, context, subspace=self.subspace).radius.reshape(-1).double()
            known = radius[radius.isfinite()]
            measured = {"spectral_radius": math.nan, "spectral_radius_max": math.nan}
            if len(known):
                measured["spectral_radius"] = float(known.median())
                measured["spectral_radius_max"] = float(known.max())
            measured["unstable"] = float((~(radius < 1)).double().mean()) if len(radius) else math.nan
            if getattr(f, "has_energy", False) and not hasattr(solution, "energy"):
                with torch.no_grad():
                    energy = f.energy(state, context).reshape(-1).double()
                measured["energy"] = float(energy[energy.isfinite()].mean())
        return measured


def _usable(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


@contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """Whatever is drawn inside, from torch's CPU generator or one that a module holds, was not drawn after."""
    held = {name: generator.get_state() for name, generator in generators(model).items()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for name, generator in generators(model).items():
            generator.set_state(held[name])
