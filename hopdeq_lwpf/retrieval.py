"""One retrieval step as a fixed-point function, with its energy. Knows no solver."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hopdeq_lwpf._types import Matvec, check_float_tensor, check_same_kind, identity, unknown, wide
from hopdeq_lwpf.forgetting import Forgetting, make_forgetting
from hopdeq_lwpf.separation import Separation, make_separation

INJECT = ("start", "input")
# Share of the weights below which the patterns at the threshold cannot put a kink into f that a solver feels.
NEGLIGIBLE = 1e-3


class RetrievalContext(NamedTuple):
    """What stays fixed during a solve; built by `Retrieval.prepare`. B = number of queries."""

    patterns: Tensor  # (N, d) shared by all queries, or (G, N, d): one set a group of L queries, B = G L
    beta: Tensor | float  # a number, a scalar tensor or (B, 1)
    mask: Tensor | None  # bool (N,) or (B, N); True = ignore
    threshold: Tensor | None  # of the forgetting unit: (B, 1) or a scalar
    injected: Tensor | None  # (B, d): inject_weight * query
    start: Tensor  # (*batch, d): the state that the query makes


class Retrieval(nn.Module):
    """f(z, X) = X^T (D' * p(D(beta X z))) [+ a q]: one step of associative recall with partial forgetting.

    p is the separation function, D the forgetting projection and D' its indicator (Ota et al. 2023,
    eq. 24-31; without forgetting Ramsauer et al. 2021, eq. 3). Where `has_energy`,

        E(z) = |z|^2 / 2 - L(D(beta X z)) / beta [- a q.z],        f(z) - z = -dE/dz,

    L being the memory Lagrangian with gradient p, and plain iteration never raises E.

    beta: inverse temperature, > 0: a number, or a tensor that broadcasts against the batch shape of the
        query, (H,) for heads in the last batch dimension, (H, 1) for (B, H, L, d). A Parameter is learned.
    separation: a name ("softmax", "sparsemax", "softmax1", "hardmax") or an object of `separation`.
    forgetting: None, a name ("relu", "pfu") or a unit of `forgetting`.
    mask_in_loop: False applies D' only at the read-out, as the published patch of hflayers does; there is
        then no energy and no metric.
    inject: "start", z0 = query; "input", the query is added in every step too.
    inject_weight: the a above, a number or a tensor as beta may be.
    """

    state_ndim = 1
    beta: float | Tensor
    inject_weight: float | Tensor

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        *,
        separation: str | Separation = "softmax",
        forgetting: None | str | Forgetting = None,
        mask_in_loop: bool = True,
        inject: str = "start",
        inject_weight: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if inject not in INJECT:
            raise unknown("inject", inject, INJECT)
        _check_positive("beta", beta)
        _check_number("inject_weight", inject_weight)
        self.separation = make_separation(separation)
        self.forgetting = make_forgetting(forgetting)
        self.mask_in_loop = mask_in_loop
        self.inject = inject
        _attach(self, "beta", beta)
        _attach(self, "inject_weight", inject_weight)

    @property
    def has_energy(self) -> bool:
        """Whether plain iteration is guaranteed to lower `energy`."""
        return bool(self.mask_in_loop and self.forgetting.has_energy and self.separation.has_energy)

    def prepare(self, query: Tensor, patterns: Tensor, mask: Tensor | None = None) -> RetrievalContext:
        """Check the input, lay it out and draw the forgetting threshold from the scores at z0 = query.

        query (*batch, d). patterns: (N, d) shared; with as many dimensions as the query, one set for the
        queries of its second last dimension, (B, N, d) for (B, L, d); with one more, one set a query.
        mask: bool, True = ignore: one entry a pattern (patterns' shape without d), or the scores' (*batch, N).
        """
        batch = _check(query, patterns, mask)
        if mask is not None and (mask.ndim > 1 or patterns.ndim > 2):
            mask = mask if mask.ndim == len(batch) + 1 else mask.unsqueeze(-2)
            mask = mask.expand(*batch, -1).reshape(-1, patterns.shape[-2])
        if patterns.ndim > 2:
            patterns = group(batch, patterns)
        injected = None
        if self.inject == "input":
            injected = query.reshape(-1, query.shape[-1]) * _lay("inject_weight", self.inject_weight, query)
        context = RetrievalContext(patterns, _lay("beta", self.beta, query), mask, None, injected, query)
        if type(self.forgetting).draw is Forgetting.draw:
            return context
        return context._replace(threshold=self.forgetting.draw(self._scores(query, context), mask))

    def init(self, x: RetrievalContext) -> Tensor:
        """z0: the query."""
        return x.start

    def forward(self, z: Tensor, x: RetrievalContext) -> Tensor:
        """One step: (*batch, d) -> (*batch, d)."""
        value, kept = self.forgetting.project(self._scores(z, x), x.threshold, x.mask)
        weights = self.separation.weights(value, x.mask)
        return self.update(_times(weights, kept) if self.mask_in_loop else weights, x).reshape(z.shape)

    def evaluate(self, z: Tensor, x: RetrievalContext) -> tuple[Tensor, Tensor, Tensor | None]:
        """f(z, x), E(z, x) and the number of patterns kept, (*batch, d), (*batch), (*batch), in one pass."""
        value, kept = self.forgetting.project(self._scores(z, x), x.threshold, x.mask)
        weights, lagrangian = self.separation.weights_and_lagrangian(value, x.mask)
        energy = self._energy(z.reshape(-1, z.shape[-1]), lagrangian, x).reshape(z.shape[:-1])
        held = _times(weights, kept)
        piece = None if kept is None else _piece(held, kept).reshape(z.shape[:-1])
        recalled = self.update(held if self.mask_in_loop else weights, x)
        return recalled.reshape(z.shape), energy, piece

    def energy(self, z: Tensor, x: RetrievalContext) -> Tensor:
        """E(z): (*batch, d) -> (*batch). Ota et al. 2023, eq. 28, with beta and the injected query."""
        value, _ = self.forgetting.project(self._scores(z, x), x.threshold, x.mask)
        lagrangian = self.separation.lagrangian(value, x.mask)
        return self._energy(z.reshape(-1, z.shape[-1]), lagrangian, x).reshape(z.shape[:-1])

    def metric(self, z: Tensor, x: RetrievalContext) -> Matvec | None:
        """The identity where J = beta X^T diag(D') p' diag(D') X is symmetric, else None."""
        return identity if self.mask_in_loop and self.forgetting.self_adjoint else None

    def weights(self, z: Tensor, x: RetrievalContext) -> Tensor:
        """D' * p(D(beta X z)), the association of each query with each pattern: (*batch, d) -> (*batch, N)."""
        value, kept = self.forgetting.project(self._scores(z, x), x.threshold, x.mask)
        weights = _times(self.separation.weights(value, x.mask), kept)
        return weights.reshape(*z.shape[:-1], weights.shape[-1])

    def select(self, x: RetrievalContext, live: Tensor) -> tuple[RetrievalContext, Tensor]:
        """The context of the live queries (of every group that has one), and their rows."""
        rows = live.nonzero().squeeze(1)
        patterns = x.patterns
        if patterns.ndim == 3:
            length = live.shape[0] // patterns.shape[0]
            groups = live.reshape(-1, length).any(1).nonzero().squeeze(1)
            rows = (groups[:, None] * length + torch.arange(length, device=live.device)).reshape(-1)
            patterns = patterns.index_select(0, groups)
        parts = (x.mask, x.threshold, x.injected)
        start = x.start.reshape(-1, x.start.shape[-1]).index_select(0, rows)
        beta = _rows(x.beta, rows) if isinstance(x.beta, Tensor) else x.beta
        mask, threshold, injected = (None if part is None else _rows(part, rows) for part in parts)
        return RetrievalContext(patterns, beta, mask, threshold, injected, start), rows

    def _scores(self, z: Tensor, x: RetrievalContext) -> Tensor:
        """beta X z: (*batch, d) -> (B, N)."""
        scaled = z.reshape(-1, z.shape[-1]) * x.beta
        if x.patterns.ndim == 2:
            return scaled @ x.patterns.T
        groups, count, width = x.patterns.shape
        return (scaled.reshape(groups, -1, width) @ x.patterns.transpose(1, 2)).reshape(-1, count)

    def update(self, weights: Tensor, x: RetrievalContext) -> Tensor:
        """The next state that these weights make: (B, N) -> (B, d), queries in one batch dimension."""
        weights = weights.reshape(-1, weights.shape[-1])
        recalled = combine(weights, x.patterns)
        return recalled if x.injected is None else recalled + x.injected

    def _energy(self, flat: Tensor, lagrangian: Tensor, x: RetrievalContext) -> Tensor:
        beta = x.beta.reshape(-1) if isinstance(x.beta, Tensor) and x.beta.ndim else x.beta
        flat = wide(flat)
        energy = 0.5 * flat.square().sum(-1) - lagrangian / beta
        return energy if x.injected is None else energy - (x.injected * flat).sum(-1)


def combine(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sum of stored rows: (B, N) with (N, dv) or (G, N, dv) -> (B, dv)."""
    if values.ndim == 2:
        return weights @ values
    groups, count, width = values.shape
    return (weights.reshape(groups, -1, count) @ values).reshape(-1, width)


def _piece(held: Tensor, kept: Tensor) -> Tensor:
    """How many patterns are kept, -1 where the forgotten ones carry no weight that matters: (B,)."""
    return torch.where(held.sum(-1) > 1 - NEGLIGIBLE, -1.0, kept.sum(-1))


def _times(weights: Tensor, kept: Tensor | None) -> Tensor:
    return weights if kept is None else weights * kept


def _rows(part: Tensor, rows: Tensor) -> Tensor:
    """The rows of what belongs to one query; scalars and masks (N,) are shared by all."""
    return part if part.ndim < 2 else part.index_select(0, rows)


def _attach(module: nn.Module, name: str, value: float | Tensor) -> None:
    """A Parameter is learned, a tensor moves with the module, a number stays a number."""
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif isinstance(value, Tensor):
        module.register_buffer(name, value)
    else:
        setattr(module, name, float(value))


def _check_positive(name: str, value: float | Tensor) -> None:
    _check_number(name, value)
    if isinstance(value, Tensor) and value.is_meta:
        return
    low = float(value.detach().min()) if isinstance(value, Tensor) else value
    if not low > 0:
        raise ValueError(f"{name} must be > 0, got {value!r}")


def _check_number(name: str, value: float | Tensor) -> None:
    """Raise unless it is a finite number or a tensor of them."""
    if isinstance(value, Tensor):
        check_float_tensor(name, value)
        if not value.numel() or not (value.is_meta or bool(value.isfinite().all())):
            raise ValueError(f"{name} must hold finite numbers, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    elif not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def _lay(name: str, value: float | Tensor, query: Tensor) -> float | Tensor:
    """A number, a scalar tensor, or one row a query (B, 1)."""
    if not isinstance(value, Tensor):
        return value
    if value.device != query.device:
        raise ValueError(f"{name} is on {value.device} but query is on {query.device}; move one with .to()")
    value = value.to(query.dtype)
    if value.numel() == 1:
        return value.reshape(())
    try:
        return value.expand(query.shape[:-1]).reshape(-1, 1)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not broadcast against the query's batch shape "
            f"{tuple(query.shape[:-1])}; for heads use (H,) with queries (B, H, d) and (H, 1) with (B, H, L, d)"
        ) from None


def _check(query: Tensor, patterns: Tensor, mask: Tensor | None) -> torch.Size:
    """The batch shape of a query that fits the patterns and the mask; otherwise an error that says why."""
    check_float_tensor("query", query)
    check_float_tensor("patterns", patterns)
    check_same_kind("patterns", patterns, "query", query)
    if query.ndim < 1 or patterns.ndim < 2:
        raise ValueError(
            f"query must be (*batch, d) and patterns (N, d) or (*batch, N, d), got {tuple(query.shape)} "
            f"and {tuple(patterns.shape)}"
        )
    if query.shape[-1] != patterns.shape[-1]:
        raise ValueError(
            f"query has width {query.shape[-1]} but patterns have width {patterns.shape[-1]}; "
            f"got shapes {tuple(query.shape)} and {tuple(patterns.shape)}"
        )
    if query.shape[-1] == 0:
        raise ValueError(f"query of shape {tuple(query.shape)} has width 0; patterns need at least one entry")
    if patterns.shape[-2] == 0:
        raise ValueError(f"patterns of shape {tuple(patterns.shape)} hold no pattern; at least one is needed")
    batch = query.shape[:-1]
    given = patterns.shape[:-2]
    if given:
        target = batch if patterns.ndim == query.ndim + 1 else batch[:-1]
        if len(given) > len(target) or not _broadcasts(given, target):
            raise ValueError(
                f"patterns {tuple(patterns.shape)} do not fit queries {tuple(query.shape)}: give (N, d), one set "
                f"for the queries of the second last dimension {tuple(batch[:-1])} + (N, d), or one set a query "
                f"{tuple(batch)} + (N, d)"
            )
    if mask is not None:
        _check_mask(mask, patterns, batch)
    return batch


def _check_mask(mask: Tensor, patterns: Tensor, batch: torch.Size) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = ignore the pattern), got {kind}")
    if mask.device != patterns.device:
        raise ValueError(
            f"mask is on {mask.device} but patterns are on {patterns.device}; move one with .to()"
        )
    scores = (*batch, patterns.shape[-2])
    fits_patterns = mask.ndim == patterns.ndim - 1 and _broadcasts(mask.shape, patterns.shape[:-1])
    fits_scores = mask.ndim == len(scores) and _broadcasts(mask.shape, torch.Size(scores))
    if not (fits_patterns or fits_scores) or mask.shape[-1] != patterns.shape[-2]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; it must be {tuple(patterns.shape[:-1])} (one entry a pattern) "
            f"or {scores} (one entry a query and pattern)"
        )


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    tail = target[len(target) - len(shape) :] if shape else ()
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))


def group(batch: torch.Size, patterns: Tensor) -> Tensor:
    """Sets of patterns (or values) as (G, N, d), for queries of this batch shape seen as (G, L, d)."""
    rows = patterns.shape[-2:]
    target = batch if patterns.ndim == len(batch) + 2 else batch[:-1]
    return patterns.expand(*target, *rows).reshape(-1, *rows)
