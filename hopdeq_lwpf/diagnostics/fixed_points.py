"""What kind of fixed point a query ended in, and which patterns nobody recalls."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from hopdeq_lwpf._types import check_float_tensor
from hopdeq_lwpf.solvers.base import check_count, check_number

MASS = 0.90
SHARES = (1 / 2, 1 / 8, 1 / 32)


class FixedPoint(IntEnum):
    """Types of fixed points (Ramsauer et al. 2021, section 2), and the one that forgetting adds."""

    UNDEFINED = -1  # NaN among the weights
    FORGOTTEN = 0  # no pattern has a weight: total forgetting
    SINGLE = 1  # one pattern
    METASTABLE = 2  # an average of some
    GLOBAL = 3  # an average of more than half of all


class AveragingClass(IntEnum):
    """How many of N patterns are averaged (Ramsauer et al. 2021, section 3, the analysis of BERT)."""

    NONE = 0  # none: forgotten, or undefined
    I = 1  # noqa: E741 (the paper's name); more than N/2
    II = 2  # more than N/8
    III = 3  # more than N/32
    IV = 4  # at most N/32


@dataclass(frozen=True)
class Classification:
    """One entry a query, int64: kind, a `FixedPoint`; size, the k below; averaging, an `AveragingClass`."""

    kind: Tensor
    size: Tensor
    averaging: Tensor

    def share(self, kind: FixedPoint) -> float:
        """The share of the queries of this kind; NaN where there is no query."""
        return float((self.kind == kind).double().mean())

    def median_size(self, kind: FixedPoint = FixedPoint.METASTABLE) -> float:
        """The median size of the fixed points of this kind; NaN where there is none."""
        sizes = self.size[self.kind == kind].double()
        return float(sizes.quantile(0.5)) if sizes.numel() else float("nan")

    def __str__(self) -> str:
        if not self.kind.numel():
            return "no queries"
        parts = []
        for kind in FixedPoint:
            count = int((self.kind == kind).sum())
            size = f" (median size {self.median_size():g})" if kind == FixedPoint.METASTABLE else ""
            parts += [f"{100 * count / self.kind.numel():.1f} % {kind.name.lower()}{size}"] if count else []
        return ", ".join(parts)


@torch.no_grad()
def classify(
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    mass: float = MASS,
    shares: tuple[float, float, float] = SHARES,
) -> Classification:
    """The kind of fixed point that each row of weights describes.

    weights: (*batch, N), the association of each query with each pattern, as `Retrieval.weights` returns it:
    >= 0, of any separation function and forgetting unit. mask: bool, broadcastable to the weights, True =
    ignore; N counts the others only.
    mass: the size k of a fixed point is the number of largest weights that together hold this share of the
    row's weight. .90 is the paper's. The row's own weight and not 1: forgotten patterns keep their part of
    the denominator.
    shares: of N, falling: above the first a fixed point is GLOBAL and of class I, above the second of class II,
    above the third of class III, else of class IV. 1/2, 1/8, 1/32 are the paper's.
    A single weight that holds `mass` makes a fixed point SINGLE whatever N. No weight at all is FORGOTTEN,
    NaN is UNDEFINED, both with size 0. Raises TypeError or ValueError for what cannot be weights.
    """
    weights, mask = _check_weights(weights, mask)
    check_number("mass", mass, 0.0, 1.0, open_low=True)
    if len(shares) != 3 or not 1 >= shares[0] > shares[1] > shares[2] > 0:
        raise ValueError(f"shares must be three numbers in (0, 1] that fall, got {shares!r}")
    count = torch.full_like(weights[..., 0], weights.shape[-1], dtype=torch.int64)
    if mask is not None:
        weights, count = weights.masked_fill(mask, 0.0), (~mask).sum(-1)
    held = weights.sort(-1, descending=True).values.cumsum(-1, dtype=torch.float64)
    total = held[..., -1]
    # Nine equal weights of ten hold .90: rounding of the weights must not ask for the tenth.
    goal = total * mass * (1 - torch.finfo(weights.dtype).eps)
    size = (held < goal[..., None]).sum(-1) + 1
    forgotten, undefined = total == 0, ~total.isfinite()
    size = size.masked_fill(forgotten | undefined, 0)
    kind = torch.where(size > shares[0] * count, int(FixedPoint.GLOBAL), int(FixedPoint.METASTABLE))
    kind = kind.masked_fill(size == 1, int(FixedPoint.SINGLE))
    kind = kind.masked_fill(forgotten, int(FixedPoint.FORGOTTEN))
    kind = kind.masked_fill(undefined, int(FixedPoint.UNDEFINED))
    averaging = torch.ones_like(size)
    for share in shares:
        averaging = averaging + (size <= share * count)
    return Classification(kind, size, averaging.masked_fill(size == 0, int(AveragingClass.NONE)))


@dataclass(frozen=True)
class Usage:
    """Which patterns the queries use.

    queries, patterns: how many there are. total_forgetting: queries for which every pattern is forgotten.
    dead: rows of the patterns that no query gives a weight, int64. support_least, support_median,
    support_most: how many patterns have a weight above 0, over the queries; NaN without queries.
    """

    queries: int
    patterns: int
    total_forgetting: int
    dead: Tensor
    support_least: float
    support_median: float
    support_most: float

    def __str__(self) -> str:
        return (
            f"{self.total_forgetting} of {self.queries} queries forget every pattern; {len(self.dead)} of "
            f"{self.patterns} patterns are dead; support {self.support_least:g} to {self.support_most:g}, "
            f"median {self.support_median:g}"
        )


@torch.no_grad()
def usage(weights: Tensor, *, mask: Tensor | None = None, sets: int = 1) -> Usage:
    """Count total forgetting, dead patterns and supports.

    weights, mask: as in `classify`. A pattern is dead if no query gives it a weight above 0, be it forgotten
    or below the smallest number of the dtype (softmax in float32 at a score 104 below the largest); a pattern
    that every query ignores is not counted at all; without queries none is dead. NaN is no weight.
    sets: how many sets of patterns there are, each for an equal share of the queries in order; `dead` then
    counts through all sets, pattern i of set j being j N + i.
    """
    weights, mask = _check_weights(weights, mask)
    check_count("sets", sets, 1)
    positive = weights > 0
    visible = torch.ones_like(positive) if mask is None else ~mask
    positive = positive & visible
    support = positive.sum(-1).reshape(-1).double()
    count = weights.shape[-1]
    if support.numel() % sets:
        raise ValueError(f"sets must divide the {support.numel()} queries, got {sets}")
    asked = support.numel() > 0
    length = support.numel() // sets if asked else 1
    seen = visible.reshape(sets, length, count).any(1) if asked else visible.new_ones(sets, count)
    dead = seen & ~positive.reshape(sets, length, count).any(1) if asked else ~seen
    seen, dead = seen.reshape(-1), dead.reshape(-1)
    nothing = float("nan")
    return Usage(
        queries=support.numel(),
        patterns=int(seen.sum()),
        total_forgetting=int(((weights.masked_fill(~visible, 0.0) == 0).all(-1)).sum()),
        dead=dead.nonzero().squeeze(1),
        support_least=float(support.min()) if support.numel() else nothing,
        support_median=float(support.quantile(0.5)) if support.numel() else nothing,
        support_most=float(support.max()) if support.numel() else nothing,
    )


def _check_weights(weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weights, and the mask of their shape."""
    if not isinstance(weights, Tensor):
        raise TypeError(
            f"weights must be a tensor (*batch, N), as Retrieval.weights(state, x) returns it; got "
            f"{type(weights).__name__}. For a Recall there is diagnose()"
        )
    check_float_tensor("weights", weights)
    if weights.ndim < 1 or not weights.shape[-1]:
        raise ValueError(f"weights must be (*batch, N) with N >= 1, got the shape {tuple(weights.shape)}")
    if bool((weights < 0).any()):
        raise ValueError(f"weights must be >= 0, got {float(weights[weights < 0].min()):.3g}")
    if mask is None:
        return weights, None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = ignore the pattern), got {kind}")
    try:
        return weights, mask.expand(weights.shape)
    except RuntimeError:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; it must broadcast to the weights {tuple(weights.shape)}"
        ) from None
