"""retrieve(): the one-call front of retrieval and solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hopdeq_lwpf._layout import check_input, group, without_padding
from hopdeq_lwpf._types import Solution, check_float_tensor, check_same_kind
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.normalization import Normalization
from hopdeq_lwpf.retrieval import AnyContext, Retrieval, RetrievalContext, StreamedContext, combine, streams
from hopdeq_lwpf.screening import SCREEN_FROM, SCREEN_UP_TO, Screened, screens
from hopdeq_lwpf.separation import Separation
from hopdeq_lwpf.solvers.adjoints import Adjoint, make_adjoint
from hopdeq_lwpf.solvers.base import Solver, transformed
from hopdeq_lwpf.solvers.registry import make_solver
from hopdeq_lwpf.solvers.solve import check_steps, fixed_point
from hopdeq_lwpf.solvers.termination import Termination
from hopdeq_lwpf.streaming import PatternSource, TensorPatterns, as_source

Patterns: TypeAlias = Tensor | PatternSource | Sequence[Tensor] | Callable[[], Iterable[Tensor]]
# Scores of all queries with all patterns from which on a tensor is looked at in blocks. Where no gradient is recorded,
# this is where they leave the cache, and blocks were measured to be twice as fast; with one, second derivatives are
# given up only where memory asks for it, at 64 MiB in float32, of which a step needs several.
STREAM_FROM = 2**21
STREAM_FROM_WITH_GRADIENT = 2**24


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
    patterns: Patterns,
    *,
    beta: float | Tensor = 1.0,
    values: Tensor | PatternSource | None = None,
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
    stream: bool | None = None,
    screen: bool | None = None,
) -> Recall:
    """Recall stored patterns from queries: one step of attention, k steps, or the converged dynamics.

    query (*batch, d); patterns (N, d), or sets as in `Retrieval.prepare`, or a source of blocks: `open_patterns(file)`,
    a list of tensors (n, d), a function that returns an iterator of them, `ShardedPatterns`; values: what is read out
    instead of the patterns, (N, dv) or with the patterns' leading dimensions, or a mapped file. mask: bool, True =
    ignore.
    beta, forgetting, separation, inject, inject_weight, similarity, normalize: see `Retrieval`.
    steps: how many times the separation function is applied: k - 1 state updates with the patterns and one
        read-out with the values, so that 1 is attention; None reads out at the equilibrium.
    solver, stop, adjoint, trace: see `fixed_point`.
    stream: whether the patterns are looked at in blocks, so that memory does not grow with N: the same result to
        rounding, and no second derivatives. None: sources always, and a tensor (N, d) where separation and forgetting
        allow it, from 2**21 scores (B N) on, where it is faster; from 2**24 where a gradient is recorded.
    screen: whether streamed patterns are solved on a few candidates of each query, with a bound that says how far
        those may be trusted, and every equilibrium verified by a pass over all patterns (`screening.Screened`). None:
        from 2**14 patterns on where that is possible (dot products; no unit but ReLU and PFU with a threshold that
        stays; trace=False) and the candidates of all queries fit into 16 MiB. False compares.

    Returns a Recall whose `value` is the read-out (*batch, dv) without the injected query, with gradient, and
    whose `state` is the equilibrium, or the k-th iterate. The read-out is weights @ values, 0 where everything
    was forgotten (where the state with euclidean scores stays what it was); with `normalize` the read-out of
    the patterns is normalised as states are, that of values is not, and steps=1 is attention with a
    normalised query. A query that requires grad is refused when
    inject="start" and steps=None, since its gradient would be lost (see `fixed_point`).
    """
    check_steps(steps)
    # The names are checked although k steps use neither, so that a misspelt one is never silent.
    solves = make_solver(solver)
    make_adjoint(adjoint)
    f = Retrieval(
        beta,
        separation=separation,
        forgetting=forgetting,
        inject=inject,
        inject_weight=inject_weight,
        similarity=similarity,
        normalize=normalize,
    )
    given = _source(f, query, patterns, values, mask, stream)
    x = f.prepare(query, given, mask)
    read = None
    if isinstance(x, StreamedContext):
        # Each rank must make the same passes in the same order.
        asked = {"steps": steps, "stop": stop, "solver": solver, "adjoint": adjoint, "trace": trace}
        told: dict[str, object] = {name: _said(part) for name, part in asked.items()}
        x.ranks.check_same(told | {"choice whether there are values": values is None})
        x = x if values is None else x.with_values(values)
    elif values is not None:
        read = _lay_values(cast(Tensor, values), query, cast(Tensor, patterns), mask)
    if steps is None:
        chosen = _screened(f, x, solves, screen, trace) or solver
        # A query that enters every step keeps its gradient there; the one through z0 is zero.
        z0 = f.init(x).detach() if inject == "input" else f.init(x)
        solution = fixed_point(
            f, x, z0, solver=chosen, stop=stop, adjoint=adjoint, trace=trace, read_out=True
        )
    else:
        solution = fixed_point(f, x, f.init(x), steps=steps, stop=stop, trace=trace, read_out=True)
    if isinstance(x, StreamedContext):
        return _recall_streamed(f, x, solution, solved=steps is None)
    return _recall(f, x, solution, read)


def _said(part: object) -> object:
    """What tells one setting from another in every process: the text of an object may name its address."""
    plain = part is None or isinstance(part, (str, int)) or dataclasses.is_dataclass(part)
    return part if plain else type(part).__qualname__


def _source(
    f: Retrieval, query: Tensor, patterns: Patterns, values: object, mask: Tensor | None, stream: bool | None
) -> Tensor | PatternSource:
    """The patterns as they are looked at: a tensor, or blocks."""
    if stream not in (None, True, False):
        raise TypeError(f"stream must be None, True or False, got {stream!r}")
    source = as_source(patterns)
    if source is not None:
        if stream is False:
            raise ValueError(f"stream=False needs patterns as a tensor, got {source!r}")
        return source
    assert isinstance(patterns, Tensor)
    check_input(query, patterns, mask)
    if stream is None:
        given = (query, patterns, values, *f.parameters(), *f.buffers())
        recorded = torch.is_grad_enabled() and any(getattr(part, "requires_grad", False) for part in given)
        least = STREAM_FROM_WITH_GRADIENT if recorded else STREAM_FROM
        large = patterns.ndim == 2 and query.shape[:-1].numel() * len(patterns) >= least
        stream = large and streams(f) and not transformed() and not torch.compiler.is_compiling()
        stream = stream and all(forward_ad.unpack_dual(given).tangent is None for given in (query, patterns))
    if stream and patterns.ndim != 2:
        raise ValueError(
            f"stream=True needs patterns (N, d) that all queries share, got {tuple(patterns.shape)}"
        )
    return TensorPatterns(patterns) if stream else patterns


def _screened(
    f: Retrieval, x: AnyContext, solver: Solver | None, screen: bool | None, trace: bool
) -> Solver | None:
    """The solver that screens; None where none is wanted or it cannot."""
    if screen not in (None, True, False):
        raise TypeError(f"screen must be None, True or False, got {screen!r}")
    if not isinstance(x, StreamedContext):
        return None
    own = solver is None or hasattr(solver, "propose")
    small = Screened.candidates * x.start.numel() <= SCREEN_UP_TO
    many = own and small and not trace and x.total >= SCREEN_FROM and screens(f, x)
    return cast(Solver, Screened(solver)) if (many if screen is None else screen) else None


def _recall_streamed(f: Retrieval, x: StreamedContext, solution: Solution, *, solved: bool) -> Recall:
    """What the read-out of a streamed solution saw."""
    found, shape = x.look.attended, solution.result.shape
    assert found is not None
    assert found.top is not None
    assert found.first is not None
    assert x.look.support is not None
    value = solution.value
    if x.values is None and f.normalization is not None:
        value = f.normalization.apply(value)
    with torch.no_grad():
        weight = (found.top - found.lse).exp()
        if f.similarity == "euclidean":
            weight = weight / found.mass.masked_fill(found.mass == 0, 1.0)
        energy = None
        if f.has_energy:
            state = solution.state.detach()
            # At an equilibrium the read-out has seen the state; after k steps it saw the one before.
            energy = f.energy_from(state, found.lse, x) if solved else f.energy(state, x)
        fields = {field.name: getattr(solution, field.name) for field in dataclasses.fields(Solution)}
        fields |= {"value": value, "note": x.look.note()}
        return Recall(
            **fields,
            index=found.first.masked_fill(~(weight > 0), -1).reshape(shape),
            weight=weight.to(solution.state.dtype).reshape(shape),
            support=x.look.support.reshape(shape),
            energy=energy,
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
