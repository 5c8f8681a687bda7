"""retrieve(): the one-call front of retrieval and solver."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from hopdeq_lwpf._layout import group, without_padding
from hopdeq_lwpf._types import Solution, check_float_tensor, check_same_kind
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.normalization import Normalization
from hopdeq_lwpf.retrieval import Retrieval, RetrievalContext, combine
from hopdeq_lwpf.separation import Separation
from hopdeq_lwpf.solvers.adjoints import Adjoint, make_adjoint
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.registry import make_solver
from hopdeq_lwpf.solvers.solve import check_steps, fixed_point
from hopdeq_lwpf.solvers.termination import Termination


@dataclass(frozen=True)
class Recall(Solution):
    """What was recalled, one entry a query in every field; these four carry no gradient.

    index: the stored pattern of largest weight at the read-out, int64; -1 where everything was forgotten or
        masked. weight: its weight, 0 there. support: how many patterns have a weight above 0.
    energy: of the returned state; None where the function has none.
    """

    index: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    weight: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    support: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    energy: Tensor | None = None


def retrieve(  # noqa: PLR0913 (one call with keywords is the point)
    query: Tensor,
    patterns: Tensor,
    *,
    beta: float | Tensor = 1.0,
    values: Tensor | None = None,
    forgetting: None | str | Forgetting = None,
    separation: str | Separation = "softmax",
    mask: Tensor | None = None,
    steps: int | None = None,
    inject: str = "start",
    inject_weight: float | Tensor = 1.0,
    similarity: str | None = None,
    normalize: None | str | Normalization = None,
    solver: str | Solver = "auto",
    stop: Termination = Termination(),  # noqa: B008 (frozen)
    adjoint: str | Adjoint = "implicit",
    trace: bool = False,
) -> Recall:
    """Recall stored patterns from queries: one step of attention, k steps, or the converged dynamics.

    query (*batch, d); patterns (N, d), or sets as in `Retrieval.prepare`; values: what is read out instead of
    the patterns, (N, dv) or with the patterns' leading dimensions. mask: bool, True = ignore.
    beta, forgetting, separation, inject, inject_weight, similarity, normalize: see `Retrieval`.
    steps: how many times the separation function is applied: k - 1 state updates with the patterns and one
        read-out with the values, so that 1 is attention; None reads out at the equilibrium.
    solver, stop, adjoint, trace: see `fixed_point`.

    Returns a Recall whose `value` is the read-out (*batch, dv) without the injected query, with gradient, and
    whose `state` is the equilibrium, or the k-th iterate. The read-out is weights @ values, 0 where everything
    was forgotten (where the state with euclidean scores stays what it was); with `normalize` the read-out of
    the patterns is normalised as states are, that of values is not, and steps=1 is attention with a
    normalised query. A query that requires grad is refused when
    inject="start" and steps=None, since its gradient would be lost (see `fixed_point`).
    """
    check_steps(steps)
    f = Retrieval(
        beta,
        separation=separation,
        forgetting=forgetting,
        inject=inject,
        inject_weight=inject_weight,
        similarity=similarity,
        normalize=normalize,
    )
    x = f.prepare(query, patterns, mask)
    read = None if values is None else _lay_values(values, query, patterns, mask)
    if steps is None:
        # A query that enters every step keeps its gradient there; the one through z0 is zero.
        z0 = f.init(x).detach() if inject == "input" else f.init(x)
        options = {"solver": solver, "stop": stop, "adjoint": adjoint, "trace": trace}
        return _recall(f, x, fixed_point(f, x, z0, read_out=True, **options), read)  # type: ignore[arg-type]
    # The names are checked although k steps use neither, so that a misspelt one is never silent.
    make_solver(solver)
    make_adjoint(adjoint)
    return _recall(
        f, x, fixed_point(f, x, f.init(x), steps=steps, stop=stop, trace=trace, read_out=True), read
    )


def _recall(f: Retrieval, x: RetrievalContext, solution: Solution, values: Tensor | None) -> Recall:
    """The read-out of the values, or of the patterns, at the weights that the solution holds, and what it says."""
    weights = solution.value  # (*batch, N)
    read = x.patterns if values is None else values
    value = combine(weights.reshape(-1, weights.shape[-1]), read)
    value = value.reshape(*weights.shape[:-1], read.shape[-1])
    if values is None and f.normalization is not None:
        value = f.normalization.apply(value)
    with torch.no_grad():
        weight, index = weights.max(-1)
        empty = ~(weight > 0)  # a NaN query points to no pattern either
        fields = {field.name: getattr(solution, field.name) for field in dataclasses.fields(Solution)}
        return Recall(
            **{**fields, "value": value},
            index=index.masked_fill(empty, -1),
            weight=weight,
            support=(weights > 0).sum(-1),
            energy=f.energy(solution.state.detach(), x) if f.has_energy else None,
        )


def _lay_values(values: Tensor, query: Tensor, patterns: Tensor, mask: Tensor | None) -> Tensor:
    """Values beside the patterns: (N, dv) or (G, N, dv)."""
    check_float_tensor("values", values)
    check_same_kind("values", values, "patterns", patterns)
    if (
        values.ndim < 2
        or values.shape[:-1] != patterns.shape[: values.ndim - 1]
        or values.ndim != patterns.ndim
    ):
        raise ValueError(
            f"values must have one row a pattern, {tuple(patterns.shape[:-1])} + (dv,); got {tuple(values.shape)}"
        )
    if mask is not None:
        values = without_padding(values, mask)
    return values if values.ndim == 2 else group(query.shape[:-1], values)
