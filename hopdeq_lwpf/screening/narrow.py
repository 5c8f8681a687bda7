"""A retrieval over the candidates of each query, and how far it may stand for the whole one."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf._types import Matvec, identity
from hopdeq_lwpf.retrieval import Retrieval
from hopdeq_lwpf.retrieval.context import piece_of, times


class Candidates(NamedTuple):
    """The small problem of each query. B queries, k candidates."""

    patterns: Tensor  # (B, k, d)
    padding: Tensor  # bool (B, k), True = no candidate
    beta: Tensor | float  # a number, a scalar or (B, 1)
    threshold: Tensor | None  # of the forgetting unit: (B, 1) or a scalar
    injected: Tensor | None  # (B, d)
    reference: Tensor  # (B, d): the state at which the pass was made
    merged: Tensor  # (B, d): weighted mean of the kept patterns that are no candidates
    share: Tensor  # (B, 1): log of their mass at the reference
    forgotten: Tensor  # (B, 1): log of the mass of forgotten ones, and of the empty score of softmax1
    doubtful: Tensor  # (B, 1): log of the mass that patterns at the forgetting threshold may have
    radius: float  # length of the longest pattern
    trust: float  # share of |f| by which f may be wrong


class Narrow:
    """f over the candidates of each query; see `FixedPointFunction`."""

    state_ndim = 1

    def __init__(self, f: Retrieval) -> None:
        self.unit = f.forgetting
        self.has_energy = f.has_energy

    def __call__(self, z: Tensor, x: Candidates) -> Tensor:
        return self.evaluate(z, x)[0]

    def evaluate(self, z: Tensor, x: Candidates):  # type: ignore[no-untyped-def]
        """f, a function that makes its energy, and the piece of f that z lies in."""
        logits, kept = self._logits(z, x)
        weights, held = self._weigh(logits, kept)
        piece = None if kept is None else piece_of(weights[:, :-2], held, kept)
        return self._image(weights, held, x), lambda: self._energy(z, logits.logsumexp(-1), x), piece

    def energy(self, z: Tensor, x: Candidates) -> Tensor:
        """E(z), up to rounding that of the whole problem at the reference: (B, d) -> (B,)."""
        return self._energy(z, self._logits(z, x)[0].logsumexp(-1), x)

    def metric(self, z: Tensor, x: Candidates) -> Matvec | None:
        """The identity where the Jacobian is symmetric."""
        return identity if self.unit.self_adjoint else None

    def select(self, x: Candidates, live: Tensor) -> tuple[Candidates, Tensor]:
        """The candidates of the live queries, and their rows."""
        rows = live.nonzero().squeeze(1)
        return narrowed(x, rows), rows

    def trusted(self, z: Tensor, x: Candidates) -> Tensor:
        """Whether what is left out can move f by no more than the share `trust` of |f|: bool (B,)."""
        logits, kept = self._logits(z, x)
        total = logits.logsumexp(-1, keepdim=True)
        image = self._image(*self._weigh(logits, kept), x)
        size = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        way = torch.linalg.vector_norm(z - x.reference, dim=-1, keepdim=True)
        delta = x.beta * x.radius * way
        left = (x.share - total).exp() * torch.expm1(delta) + (x.doubtful - total + delta).exp()
        return (2 * left * (x.radius + size) <= x.trust * size)[:, 0]

    def _logits(self, z: Tensor, x: Candidates) -> tuple[Tensor, Tensor | None]:
        """D of the candidates, then that of the merged pattern and the log of what else is in the denominator."""
        scores = x.beta * torch.bmm(x.patterns, z[:, :, None])[:, :, 0]
        value, kept = self.unit.project(scores, x.threshold, x.padding)
        moved = x.share + x.beta * ((z - x.reference) * x.merged).sum(-1, keepdim=True)
        return torch.cat([value.masked_fill(x.padding, -math.inf), moved, x.forgotten], -1), kept

    def _weigh(self, logits: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Shares of all that is in the denominator, (B, k + 2), and those of the kept candidates, (B, k)."""
        weights = logits.softmax(-1)
        return weights, times(weights[:, :-2], kept)

    def _image(self, weights: Tensor, held: Tensor, x: Candidates) -> Tensor:
        image = torch.bmm(held[:, None], x.patterns)[:, 0] + weights[:, -2:-1] * x.merged
        return image if x.injected is None else image + x.injected

    def _energy(self, z: Tensor, lagrangian: Tensor, x: Candidates) -> Tensor:
        beta = x.beta.reshape(-1) if isinstance(x.beta, Tensor) and x.beta.ndim else x.beta
        energy = 0.5 * z.square().sum(-1) - lagrangian / beta
        return energy if x.injected is None else energy - (x.injected * z).sum(-1)


def narrowed(x: Candidates, rows: Tensor) -> Candidates:
    """The candidates of these queries."""

    def kept(part: object) -> object:
        return part.index_select(0, rows) if isinstance(part, Tensor) and part.ndim > 1 else part

    return Candidates(*map(kept, x))  # type: ignore[arg-type]
