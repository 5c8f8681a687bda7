"""retrieve_on_graph(): recall of queries that belong together, in one call."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hopdeq_lwpf._layout import check_input
from hopdeq_lwpf._types import Solution, check_float_tensor, check_same_kind, unknown
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.graphs import KNN, LAPLACIANS, OPERATORS, Graph, diffusion_operator
from hopdeq_lwpf.models.association import Heads
from hopdeq_lwpf.models.diffusion.function import DiffusionContext, DiffusionRetrieval
from hopdeq_lwpf.models.diffusion.strength import Strength, make_strength
from hopdeq_lwpf.recall import Recall
from hopdeq_lwpf.separation import Separation
from hopdeq_lwpf.solvers.adjoints import Adjoint, make_adjoint
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.registry import make_solver
from hopdeq_lwpf.solvers.solve import check_steps, fixed_point
from hopdeq_lwpf.solvers.termination import Termination


def retrieve_on_graph(  # noqa: PLR0913 (one call with keywords is the point)
    query: Tensor,
    patterns: Tensor,
    *,
    lam: float | Tensor | Strength = 1.0,
    eta: float | Tensor | Strength = 0.0,
    logit_eta: float | Tensor | Strength = 0.0,
    graph: KNN = KNN(),  # noqa: B008 (frozen)
    query_graph: Graph | None = None,
    pattern_graph: Graph | None = None,
    laplacian: str = "normalized",
    diffusion: str = "heat",
    beta: float | Tensor = 1.0,
    values: Tensor | None = None,
    forgetting: None | str | Forgetting = None,
    separation: str | Separation = "softmax",
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    steps: int | None = None,
    inject: str = "start",
    inject_weight: float | Tensor = 1.0,
    solver: str | Solver = "auto",
    stop: Termination = Termination(),  # noqa: B008 (frozen)
    adjoint: str | Adjoint = "implicit",
    trace: bool = False,
) -> Recall:
    """Recall stored patterns from the queries of each sample together: neighbours are drawn to one another.

    query (*batch, L, d): the L queries of a sample are one problem. patterns (S, d), shared, or (*batch, S, d).
    lam: strength with which neighbouring queries are drawn together; logit_eta: time for which their scores
        diffuse (see `DiffusionRetrieval`). eta: time for which the stored patterns diffuse first; diffusion: how,
        "heat", "implicit" or "explicit" (`hopdeq_lwpf.graphs`). With all three 0 this is `retrieve`, but for how
        solves end.
    graph: how graphs are made from queries and patterns. query_graph, pattern_graph: used instead; a `Graph` of batch
        shape *batch, or () for all, in which padding has no edge either. laplacian: "normalized" or "combinatorial".
    values (S, dv) or (*batch, S, dv): what is read out instead of the diffused patterns.
    mask: bool, True = ignore: (S,) or (*batch, S), patterns that are padding; query_mask (*batch, L): queries that are.
        Padding is in no graph, and may hold anything; the read-out of a query that is padding means nothing.
    beta, forgetting, separation, inject, inject_weight: see `Retrieval`; steps: see `retrieve`. solver, stop, adjoint,
        trace: see `fixed_point`.

    Returns a Recall, one entry a sample in the fields of a Solution and in `energy`; `value` (*batch, L, dv), the
    read-out, carries the gradient; `index`, `weight` and `support`, (*batch, L), are of each query's own weights,
    before they are mixed with its neighbours'. Memory is linear in queries, patterns and edges where the graphs
    are sparse and no mask is given (`hopdeq_lwpf.graphs.KNN`, sparse).
    """
    check_steps(steps)
    check_input(query, patterns, None)
    _check(query, patterns, values, graph)
    for name, value, allowed in (("diffusion", diffusion, OPERATORS), ("laplacian", laplacian, LAPLACIANS)):
        if value not in allowed:
            raise unknown(name, value, allowed)
    batch = tuple(query.shape[:-2])
    f = DiffusionRetrieval(
        beta,
        lam=lam,
        logit_eta=logit_eta,
        forgetting=forgetting,
        separation=separation,
        inject=inject,
        inject_weight=inject_weight,
    )
    time = make_strength("eta", eta)
    query = _cleared("query_mask", query, query_mask, batch)
    stored = _cleared("mask", patterns, mask, batch)
    if not time.off:
        near = _graph("pattern_graph", pattern_graph, graph, stored, mask, batch)
        stored = _diffused(stored, near, time, batch, laplacian, diffusion)
    of_states = None
    if not (f.lam.off and f.logit_eta.off):
        of_states = _graph("query_graph", query_graph, graph, query, query_mask, batch).laplacian(laplacian)
    read = stored if values is None else _cleared("mask", values, mask, batch)
    keys, read = (part.expand(*batch, *part.shape[-2:]) for part in (stored, read))
    ignored = None if mask is None else mask.expand(*batch, mask.shape[-1]).unsqueeze(-2)
    heads = Heads(query, keys, read, ignored, None, of_states)
    x = f.prepare(heads, read_values=True)
    make_solver(solver)
    make_adjoint(adjoint)
    options = {"steps": steps, "stop": stop, "trace": trace, "read_out": True}
    if steps is not None:
        return _recall(f, x, fixed_point(f, x, f.init(x), **options), steps)  # type: ignore[arg-type]
    z0 = f.init(x).detach() if inject == "input" else f.init(x)
    solution = fixed_point(f, x, z0, solver=solver, adjoint=adjoint, **options)  # type: ignore[arg-type]
    return _recall(f, x, solution, steps)


def _diffused(  # noqa: PLR0913
    stored: Tensor, near: Graph, time: Strength, batch: tuple[int, ...], laplacian: str, diffusion: str
) -> Tensor:
    """The stored patterns after their diffusion, one set for all samples where they and what moves them are."""
    eta = time.over(batch, stored)
    own = isinstance(eta, Tensor) and eta.ndim > 0
    if own or near.batch not in ((), tuple(stored.shape[:-2])):
        near, stored = near.expand(batch), stored.expand(*batch, *stored.shape[-2:])
    operator = diffusion_operator(diffusion, near.laplacian(laplacian), eta)
    return operator.expand(tuple(stored.shape[:-2]))(stored)


def _recall(f: DiffusionRetrieval, x: DiffusionContext, solution: Solution, steps: int | None) -> Recall:
    """The solution with what it says of the memories that the queries are at, in the state that is read out."""
    with torch.no_grad():
        read_at = solution.state if steps is None else f.init(x)
        for _ in range((steps or 1) - 1):
            read_at = f(read_at, x)
        weight, index, support = f.nearest(read_at.detach(), x)
        return Recall(
            **{field.name: getattr(solution, field.name) for field in dataclasses.fields(Solution)},
            index=index,
            weight=weight,
            support=support,
            energy=f.energy(solution.state.detach(), x) if f.has_energy else None,
        )


def _check(query: Tensor, patterns: Tensor, values: Tensor | None, graph: KNN) -> None:
    """Raise for what `check_input` lets pass but one problem a sample cannot be."""
    if query.ndim < 2:
        raise ValueError(
            f"query must be (*batch, L, d), the queries of each sample, got {tuple(query.shape)}"
        )
    if patterns.ndim > query.ndim:
        raise ValueError(
            f"patterns must be (S, d) or (*batch, S, d), one set for all queries of a sample, got "
            f"{tuple(patterns.shape)} for queries {tuple(query.shape)}"
        )
    if values is not None:
        check_float_tensor("values", values)
        check_same_kind("values", values, "patterns", patterns)
        if not 2 <= values.ndim <= query.ndim or values.shape[-2] != patterns.shape[-2]:
            count = patterns.shape[-2]
            raise ValueError(
                f"values must have one row a pattern, ({count}, dv) or (*batch, {count}, dv), got {tuple(values.shape)}"
            )
    if not callable(graph):
        raise TypeError(
            f"graph says how graphs are made, KNN(...), got {type(graph).__name__}; a Graph itself is query_graph or "
            "pattern_graph"
        )


def _graph(  # noqa: PLR0913
    name: str, given: Graph | None, how: KNN, rows: Tensor, mask: Tensor | None, batch: tuple[int, ...]
) -> Graph:
    """The graph that was given, checked and without padding, or one that is made from these rows."""
    nodes = rows.shape[-2]
    if given is None:
        return how(rows, None if mask is None else mask.expand(rows.shape[:-1]))
    if not isinstance(given, Graph):
        raise TypeError(
            f"{name} must be a Graph, got {type(given).__name__}; Graph.from_adjacency(weight) makes one"
        )
    if given.nodes != nodes or given.batch not in ((), batch):
        raise ValueError(
            f"{name} has {given.nodes} nodes and batch shape {given.batch}, needs {nodes} nodes and batch shape "
            f"{batch} or ()"
        )
    if mask is None:
        return given
    samples = given.batch or tuple(mask.shape[:-1])
    return given.expand(samples).isolate(mask.expand(*samples, nodes))


def _cleared(name: str, rows: Tensor, mask: Tensor | None, batch: tuple[int, ...]) -> Tensor:
    """Rows that are padding as zeros: what is mixed over a graph must not hold NaN."""
    if mask is None:
        return rows
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"{name} must be a bool tensor, True = ignore, got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    if tuple(mask.shape) not in (tuple(rows.shape[-2:-1]), (*batch, rows.shape[-2])):
        raise ValueError(
            f"{name} must have one entry a row, {tuple(rows.shape[-2:-1])} or {(*batch, rows.shape[-2])}, got "
            f"{tuple(mask.shape)}"
        )
    return rows.masked_fill(mask[..., None], 0.0)
