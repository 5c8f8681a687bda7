"""What stays fixed during a retrieval, and the products with it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf._layout import set_number
from hopdeq_lwpf._types import wide
from hopdeq_lwpf.separation import Separation

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
    pull: Tensor | float | None = None  # inject_weight as beta is laid out, where f divides by it
    half_squares: Tensor | None = None  # (N,) or (G, N): |xi|^2 / 2; None where scores need none, or make it
    bias: Tensor | None = None  # (B, N): added to the scores, of models that have such a thing (dot only)

    def select(self, live: Tensor) -> tuple[RetrievalContext, Tensor]:
        """The context of the live queries, and their rows.

        Where queries share patterns in groups, it is filled up so that each group that has some keeps equally many:
        narrowed to whole groups, a solve would go on with nearly all queries for a few stragglers.
        """
        groups, rows = None, live.nonzero().squeeze(1)
        if self.patterns.ndim == 3:
            among = live.reshape(self.patterns.shape[0], -1)
            counts = among.sum(1)
            groups = counts.nonzero().squeeze(1)
            first = among.index_select(0, groups).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            rows = (groups[:, None] * among.shape[1] + first[:, : int(counts.max())]).reshape(-1)

        def kept(part: Any) -> Any:
            """The rows of what belongs to one query; numbers, scalars and masks (N,) are shared by all."""
            return part.index_select(0, rows) if isinstance(part, Tensor) and part.ndim > 1 else part

        start = kept(self.start.reshape(-1, self.start.shape[-1]))
        narrowed = RetrievalContext(*map(kept, self._replace(start=None, patterns=None, half_squares=None)))  # type: ignore[arg-type]
        shared = {"patterns": self.patterns, "half_squares": self.half_squares}
        if groups is not None:
            shared = {name: None if p is None else p.index_select(0, groups) for name, p in shared.items()}
        return narrowed._replace(start=start, **shared), rows  # type: ignore[arg-type]


def combine(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sum of stored rows: (B, N) with (N, dv) or (G, N, dv) -> (B, dv)."""
    if values.ndim == 2:
        return weights @ values
    groups, count, width = values.shape
    return (_by_group(weights, groups) @ values).reshape(-1, width)


def products(flat: Tensor, patterns: Tensor) -> Tensor:
    """(B, d) with (N, d) or (G, N, d) -> (B, N)."""
    if patterns.ndim == 2:
        return flat @ patterns.T
    groups, count, width = patterns.shape
    return (_by_group(flat, groups) @ patterns.transpose(1, 2)).reshape(-1, count)


def less_products(constants: Tensor, flat: Tensor, patterns: Tensor) -> Tensor:
    """(N,) or (G, N) minus the products of (B, d) with (N, d) or (G, N, d) -> (B, N)."""
    if patterns.ndim == 2:
        return torch.addmm(constants, flat, patterns.T, alpha=-1)
    groups, count, width = patterns.shape
    rows = _by_group(flat, groups)
    return torch.baddbmm(constants[:, None], rows, patterns.transpose(1, 2), alpha=-1).reshape(-1, count)


def _by_group(flat: Tensor, groups: int) -> Tensor:
    """(G L, n) -> (G, L, n), also where there is no group."""
    return flat.reshape(groups, len(flat) // max(groups, 1), flat.shape[-1])


def make_half_squares(patterns: Tensor) -> Tensor:
    """|xi|^2 / 2 of each pattern, in float32 or wider."""
    return 0.5 * wide(patterns).square().sum(-1)


def without_autocast(device: str) -> AbstractContextManager[object]:
    active = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if active else nullcontext()


def asked_similarity(separation: Separation) -> str:
    """The similarity that a separation is made for."""
    asked: str = getattr(separation, "similarity", "dot")
    return asked


def active_set(held: Tensor) -> Tensor:
    """A number for the set of patterns of weight > 0: (B, N) -> (B,)."""
    return set_number((held > 0).to(held.dtype))


def piece_of(weights: Tensor, held: Tensor, kept: Tensor) -> Tensor:
    """A number for the set of kept patterns, -1 where the forgotten ones carry no weight that matters: (B,)."""
    return torch.where(held.sum(-1) > (1 - NEGLIGIBLE) * weights.sum(-1), -1.0, set_number(kept))


def times(weights: Tensor, kept: Tensor | None) -> Tensor:
    """The weights of what is kept; None: everything."""
    return weights if kept is None else weights * kept
