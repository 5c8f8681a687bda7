"""The classical Hopfield network (Hopfield 1982), updated synchronously: the baseline of the recall experiments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf._layout import check_input
from hopdeq_lwpf._types import wide
from hopdeq_lwpf.models.sdm.function import as_float, check_bits, without_autocast
from hopdeq_lwpf.models.sdm.recalls import AssociativeMemory, SDMRecall
from hopdeq_lwpf.solvers.adjoints import Adjoint
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.termination import Termination


class HopfieldContext(NamedTuple):
    """What stays fixed during a solve."""

    keys: Tensor  # (N, n): signs, float32 or wider
    start: Tensor  # (*batch, n): 0 and 1


class ClassicalHopfieldFunction(torch.nn.Module):
    """f(z) = 1 where (W s)_i > 0, else 0; s = 2z - 1, W = (1/n) P P^T without its diagonal, P the signs of patterns.

    W is never made: W s = (P (P^T s) - N s) / n takes 2 n N numbers instead of n^2.
    """

    state_ndim = 1
    has_energy = (
        False  # the energy falls when one unit moves at a time; together they may cycle between two states
    )
    smooth = False
    binary = True
    empty = "keep"  # every pattern takes part in each update

    def prepare(self, query: Tensor | HopfieldContext, patterns: Tensor | None = None) -> HopfieldContext:
        """Check the input; a context that was made passes as it is."""
        if isinstance(query, HopfieldContext):
            return query
        query, patterns = as_float("query", query, True), as_float("patterns", patterns, True)
        check_input(query, patterns, None)
        if patterns.ndim != 2:
            raise ValueError(f"patterns must be (N, n), one set for all queries, got {tuple(patterns.shape)}")
        check_bits("query", query, nan=True, hint="0 for -1")
        check_bits("patterns", patterns, hint="0 for -1")
        if torch.is_grad_enabled() and (query.requires_grad or patterns.requires_grad):
            raise ValueError(
                "query or patterns require grad, but signs have no gradient; call it under torch.no_grad(), or use "
                "SDM(Attention(beta), space='continuous')"
            )
        return HopfieldContext(2 * wide(patterns) - 1, query)

    def init(self, x: HopfieldContext) -> Tensor:
        """z0: the query."""
        return x.start

    def forward(self, z: Tensor, x: HopfieldContext) -> Tensor:
        """One synchronous update: (*batch, n) -> (*batch, n); a field of 0 gives 0, as published."""
        field = self._field(z, x)
        return torch.where(field.isnan(), field, (field > 0).to(field.dtype)).to(z.dtype)

    def energy(self, z: Tensor, x: HopfieldContext) -> Tensor:
        """-s.W s / 2 of the state, (*batch); synchronous updates may raise it."""
        signs = 2 * wide(z) - 1
        return -0.5 * (signs * self._field(z, x)).sum(-1)

    def _field(self, z: Tensor, x: HopfieldContext) -> Tensor:
        signs = 2 * wide(z) - 1
        with without_autocast(z):
            # Whole numbers: exact, whatever the order of the sums.
            return (signs @ x.keys.T @ x.keys - len(x.keys) * signs) / signs.shape[-1]

    def select(self, x: HopfieldContext, live: Tensor) -> tuple[HopfieldContext, Tensor]:
        """The context of the live queries, and their rows."""
        rows = live.nonzero().squeeze(1)
        return x._replace(start=x.start.reshape(-1, x.start.shape[-1]).index_select(0, rows)), rows

    def empty_reads(self, z: Tensor, x: HopfieldContext) -> Tensor:
        """False: every pattern takes part."""
        return torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device)

    def nearest(self, z: Tensor, x: HopfieldContext) -> tuple[Tensor, Tensor]:
        """Cosine of signs with the nearest pattern, and its index, -1 for NaN."""
        with without_autocast(z):
            cosine, index = ((2 * wide(z) - 1) @ x.keys.T / z.shape[-1]).max(-1)
        return cosine, index.masked_fill(cosine.isnan(), -1)


class ClassicalHopfield(AssociativeMemory):
    """Classical Hopfield network: query (*batch, n) and patterns (N, n) of 0 and 1 -> the state that it settles in.

    All units move at once, as in the published code; such an update can end in a cycle of two states (Goles and
    Olivos 1981), which `last_solution.cycle` and its note report. Arguments as in `SDM`.
    """

    f: ClassicalHopfieldFunction

    def __init__(
        self,
        *,
        steps: int | None = None,
        solver: str | Solver = "auto",
        stop: Termination = Termination(),  # noqa: B008 (frozen)
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
    ) -> None:
        f = ClassicalHopfieldFunction()
        super().__init__(f, steps=steps, solver=solver, stop=stop, adjoint=adjoint, on_failure=on_failure)

    def problem(
        self,
        query: Tensor | HopfieldContext,
        patterns: Tensor | None = None,
        *,
        return_solution: bool = False,
    ) -> tuple[HopfieldContext, Tensor]:
        """What `forward` with these arguments solves: context and start; see `Equilibrium.problem`."""
        x = self.f.prepare(query, patterns)
        return x, self.f.init(x)

    def forward(  # type: ignore[override]
        self, query: Tensor, patterns: Tensor, *, return_solution: bool = False
    ) -> Tensor | SDMRecall:
        """query (*batch, n), patterns (N, n), both of 0 and 1 -> (*batch, n)."""
        return self._recall(self.f.prepare(query, patterns), False, return_solution)
