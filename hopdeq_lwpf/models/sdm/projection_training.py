"""Training of the projection of a memory, and recall from noisy pictures (Bricken and Pehlevan 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from hopdeq_lwpf._types import check_float_tensor, unknown, wide
from hopdeq_lwpf.data.draws import check_seed
from hopdeq_lwpf.models.sdm.betas import ESTIMATORS, fit_beta
from hopdeq_lwpf.models.sdm.counting import as_number, check_whole
from hopdeq_lwpf.models.sdm.counting import check_positive as check_size
from hopdeq_lwpf.models.sdm.experiments import RECALLED, perturb
from hopdeq_lwpf.models.sdm.function import SPHERE
from hopdeq_lwpf.models.sdm.projections import KEYS, RADIUS, ProjectedMemory
from hopdeq_lwpf.models.sdm.weights import Attention
from hopdeq_lwpf.solvers.equilibrium import Equilibrium
from hopdeq_lwpf.solvers.solve import check_steps, fixed_point
from hopdeq_lwpf.solvers.termination import Termination


@dataclass(frozen=True)
class ProjectionSettings:
    """Settings of a training; the defaults are the published ones.

    keys: width of the keys. radius: d of the circle whose beta is fitted, 2 to keys; published are 5, 9, 11 and 15, and
        11 has the best ratio of signal to noise. estimator: of that fit, "published" or "ols" (see `fit_beta`).
    learn_beta: learn beta too, from beta_factor times the fit on.
    lr, epochs: of Adam; None: 0.005 and 10, 0.01 and 20 where beta is learnt.
    batch_size: patterns a step. noise: least and most noise of the queries, in bits of the pictures, drawn uniformly
        for each query: k bits are a cosine of 1 - 2 k / n. The published 10 to 100 is for n = 784.
    steps: reads that are trained through; None: to equilibrium. seed: of the start, the order and the noise.
    """

    keys: int = KEYS
    radius: int = RADIUS
    estimator: str = "published"
    learn_beta: bool = False
    beta_factor: float = 3.0
    lr: float | None = None
    epochs: int | None = None
    batch_size: int = 128
    noise: tuple[float, float] = (10, 100)
    steps: int | None = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("radius", self.radius, 2, check_whole("keys", self.keys, 2))
        if self.estimator not in ESTIMATORS:
            raise unknown("estimator", self.estimator, ESTIMATORS)
        if not isinstance(self.learn_beta, bool):
            raise TypeError(f"learn_beta must be True or False, got {self.learn_beta!r}")
        check_size("beta_factor", self.beta_factor)
        check_whole("batch_size", self.batch_size)
        if self.lr is not None:
            check_size("lr", self.lr)
        if self.epochs is not None:
            check_whole("epochs", self.epochs)
        bounds = [as_number(bits) for bits in self.noise] if isinstance(self.noise, (tuple, list)) else []
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] < math.inf:
            raise ValueError(f"noise must be two numbers of bits, 0 <= least <= most, got {self.noise!r}")
        check_steps(self.steps)
        check_seed("seed", self.seed)

    def attention(self) -> Attention:
        """The read weights: the fitted beta, or a Parameter that starts at beta_factor times it."""
        beta = fit_beta(self.keys, self.radius, estimator=self.estimator).beta
        return Attention(nn.Parameter(torch.tensor(self.beta_factor * beta)) if self.learn_beta else beta)

    def schedule(self) -> tuple[float, int]:
        """lr and epochs, where None as published."""
        lr, epochs = (0.01, 20) if self.learn_beta else (0.005, 10)
        return lr if self.lr is None else self.lr, epochs if self.epochs is None else self.epochs


@dataclass(frozen=True)
class ProjectionCourse:
    """How a training went.

    loss: mean over the batch of |read-out - pattern|^2, before each of Adam's steps, (epochs, batches) float64.
    beta: before the first epoch and after each, (epochs + 1,) float64; NaN where the read weights have none.
    """

    loss: Tensor
    beta: Tensor


@dataclass(frozen=True)
class ProjectedRecall:
    """What became of noisy queries, one entry a query, (Q,)."""

    flips: int
    cosine: Tensor  # of the final state with its target, float64
    steps: Tensor  # reads, int64
    converged: Tensor  # bool

    @property
    def mean_cosine(self) -> float:
        """Of all queries."""
        return float(self.cosine.mean())

    @property
    def recalled(self) -> float:
        """Share of the queries with a cosine above .99."""
        return float((self.cosine > RECALLED).double().mean())


def train_projection(
    patterns: Tensor,
    settings: ProjectionSettings = ProjectionSettings(),  # noqa: B008 (frozen)
    *,
    memory: ProjectedMemory | None = None,
) -> tuple[ProjectedMemory, ProjectionCourse]:
    """Learn to recall the stored patterns (N, n) from noisy copies of themselves, by Adam.

    memory: one to train as it is, in place, with its own projection, read weights, forgetting, steps and solver; lr,
        epochs, batch_size, noise and seed of the settings apply. None: a new one of the settings.
    Returns the trained memory, on the device of the patterns, and the course of the training. Its `last_solution` is
    None until it is called.
    The same patterns and settings give the same memory; torch's own generator is not used.

    Raises ValueError or TypeError for patterns and settings that do not fit, RuntimeError where the loss is no longer
    finite.
    """
    _check_patterns(patterns)
    width = patterns.shape[1]
    if settings.noise[1] > width:
        raise ValueError(
            f"noise must be at most the width n = {width} of the patterns, got {settings.noise!r}, which is made for "
            f"n = 784; the same share is ProjectionSettings(noise=({width * 10 / 784:.2g}, {width * 100 / 784:.2g}))"
        )
    generator = Generator().manual_seed(settings.seed)
    patterns = patterns.detach()
    memory = _to_train(patterns, settings, memory, generator)
    lr, epochs = settings.schedule()
    optimizer = torch.optim.Adam([weight for weight in memory.parameters() if weight.requires_grad], lr)
    losses, betas = [], [_beta(memory)]
    for epoch in range(epochs):
        order = torch.randperm(len(patterns), generator=generator).to(patterns.device)
        losses.append(
            torch.stack(
                [
                    _train_step(memory, optimizer, patterns, rows, settings.noise, generator)
                    for rows in order.split(settings.batch_size)
                ]
            )
        )
        betas.append(_beta(memory))
        if not bool(losses[-1].isfinite().all()):
            raise RuntimeError(f"the loss is no longer finite in epoch {epoch + 1}; lower lr = {lr:g}")
    optimizer.zero_grad()
    course = ProjectionCourse(torch.stack(losses).cpu(), torch.tensor(betas, dtype=torch.float64))
    return memory, course


@torch.no_grad()
def recall_projected(
    memory: ProjectedMemory,
    patterns: Tensor,
    flips: int,
    *,
    rows: Tensor | None = None,
    max_steps: int = 10,
    seed: int = 0,
    block: int = 256,
) -> ProjectedRecall:
    """Store the patterns (N, n) at keys of their own, and recall them from noisy copies.

    patterns: those of the training, or others: only these are stored, and only these are asked for.
    flips: noise in bits of the pictures, a cosine of 1 - 2 flips / n; 0 to 300 of 784 as published.
    rows: which patterns are asked for, (Q,) integers or (N,) bool; None: all.
    max_steps: reads at most, 10 as published; plain iteration, each query until it has converged (`Termination`).
    seed: of the noise, the same for all memories. block: queries at a time, which bounds memory to block x N weights.
    """
    if not isinstance(memory, ProjectedMemory):
        raise TypeError(f"memory must be a ProjectedMemory, got {type(memory).__name__}")
    _check_patterns(patterns)
    stop = Termination(max_steps=check_whole("max_steps", max_steps), check_every=1)
    check_whole("block", block)
    targets = patterns if rows is None else patterns[_check_rows(rows, len(patterns))]
    generator = Generator().manual_seed(check_seed("seed", seed))
    queries = perturb(targets, flips, space="continuous", generator=generator)
    cosine, steps, converged = [], [], []
    for query, target in zip(queries.split(block), targets.split(block), strict=True):
        x = memory.f.prepare(query, patterns)
        found = fixed_point(memory.f, x, query, solver="picard", stop=stop)
        cosine.append(nn.functional.cosine_similarity(found.state.double(), target.double(), dim=-1))
        steps.append(found.steps)
        converged.append(found.converged)
    return ProjectedRecall(flips, torch.cat(cosine), torch.cat(steps), torch.cat(converged))


def _train_step(
    memory: ProjectedMemory,
    optimizer: torch.optim.Optimizer,
    patterns: Tensor,
    rows: Tensor,
    noise: tuple[float, float],
    generator: Generator,
) -> Tensor:
    """One step of Adam; the loss before it, float64."""
    target = patterns[rows]
    query = _turned(target, noise, generator)
    optimizer.zero_grad()
    # Without the report of `memory(...)`, whose search for the nearest picture costs as much as the read itself.
    with torch.enable_grad():
        try:
            read: Tensor = Equilibrium.forward(memory, memory.f.prepare(query, patterns))  # type: ignore[assignment]
        finally:
            memory.last_solution = None  # it is no SDMRecall
        loss = (wide(read) - wide(target)).square().sum(-1).mean()
    loss.backward()
    optimizer.step()
    return loss.detach().double()


def _turned(patterns: Tensor, noise: tuple[float, float], generator: Generator) -> Tensor:
    """(B, n), each turned by noise of its own level, as `perturb` does with one level for all."""
    least, most = noise
    drawn = torch.rand(len(patterns), 1, generator=generator, dtype=torch.float64)
    cosine = (1 - 2 * (least + (most - least) * drawn) / patterns.shape[1]).to(patterns.device)
    exact = patterns.double()
    along = SPHERE.apply(exact)
    across = torch.randn(patterns.shape, generator=generator, dtype=torch.float64).to(patterns.device)
    across = SPHERE.apply(across - (across * along).sum(-1, keepdim=True) * along)
    turned = cosine * along + (1 - cosine.square()).clamp_min(0.0).sqrt() * across
    return (torch.linalg.vector_norm(exact, dim=-1, keepdim=True) * turned).to(patterns.dtype)


def _to_train(
    patterns: Tensor, settings: ProjectionSettings, memory: ProjectedMemory | None, generator: Generator
) -> ProjectedMemory:
    if memory is None:
        weights, steps = settings.attention(), settings.steps
        made = ProjectedMemory(patterns.shape[1], settings.keys, weights, steps=steps, generator=generator)
        return made.to(patterns.device, wide(patterns).dtype)
    if not isinstance(memory, ProjectedMemory):
        raise TypeError(f"memory must be a ProjectedMemory, got {type(memory).__name__}")
    if settings.learn_beta:
        raise ValueError(
            "learn_beta is for a new memory; give yours Attention(nn.Parameter(torch.tensor(beta))) instead"
        )
    if not any(weight.requires_grad for weight in memory.parameters()):
        raise ValueError(
            "memory has nothing to train: none of its parameters requires grad; call memory.requires_grad_()"
        )
    return memory.to(patterns.device)


def _beta(memory: ProjectedMemory) -> float:
    weights = memory.f.weights
    if not isinstance(weights, Attention):
        return math.nan
    beta = weights.at(memory.f.projection.shape[0])
    return float(beta.detach() if isinstance(beta, Tensor) else beta)


def _check_patterns(patterns: Tensor) -> None:
    check_float_tensor("patterns", patterns)
    if patterns.ndim != 2 or not patterns.numel():
        raise ValueError(f"patterns must be (N, n) with at least one pattern, got {tuple(patterns.shape)}")
    if not bool(patterns.isfinite().all()):
        raise ValueError("patterns must be finite, but some entries are NaN or inf; leave those rows out")


def _check_rows(rows: Tensor, count: int) -> Tensor:
    """Row numbers, as they came."""
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"rows must be a 1-d tensor of integers or bool, got {rows!r}")
    if rows.dtype == torch.bool:
        if len(rows) != count:
            raise ValueError(f"rows of bool must have one entry a pattern, {count}, got {len(rows)}")
        rows = rows.nonzero().squeeze(1)
    if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= count:
        raise ValueError(f"rows must hold at least one of 0 to {count - 1}, got {rows.tolist()[:8]}")
    return rows
