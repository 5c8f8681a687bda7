"""What theory promises of a store: separation, error bounds, storage and capacity (Ramsauer et al. 2021).

The bounds are those of softmax retrieval without forgetting and without an injected query,
f(z) = X^T softmax(beta X z). N is the number of stored patterns, M the largest of their norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf._types import check_float_tensor, wide
from hopdeq_lwpf.separation import Separation, Softmax, make_separation
from hopdeq_lwpf.solvers.base import check_count, check_number

# Rows of the Gram matrix at a time: 1,024 x 100,000 patterns in float32 are 400 MB.
BLOCK = 1024


def separation_of(patterns: Tensor, *, mask: Tensor | None = None, block: int = BLOCK) -> Tensor:
    """How well each pattern is separated: Delta_i = x_i.x_i - max_{j != i} x_i.x_j (def. 2): (..., N).

    patterns: (..., N, d). mask: bool, (..., N), True = ignore; an ignored pattern gets NaN. A pattern without
    any other gets inf; one that is stored twice at most 0. block: how many rows are compared at a time; the
    memory is O(block N) a set. Half precision is computed and returned in float32.
    Raises TypeError or ValueError for anything but finite floating-point patterns.
    """
    check_count("block", block, 1)
    mask = _check_patterns(patterns, mask)
    x = wide(patterns)
    others = [
        _largest_other(x, mask, start, min(start + block, x.shape[-2]))
        for start in range(0, x.shape[-2], block)
    ]
    delta = x.square().sum(-1) - torch.cat(others, -1)
    return delta if mask is None else delta.masked_fill(mask, torch.nan)


def _largest_other(x: Tensor, mask: Tensor | None, start: int, end: int) -> Tensor:
    """max_{j != i} x_i.x_j of the rows start <= i < end: (..., end - start)."""
    scores = x[..., start:end, :] @ x.mT
    rows = torch.arange(start, end, device=x.device)[:, None]
    hidden = rows == torch.arange(x.shape[-2], device=x.device)
    if mask is not None:
        hidden = hidden | mask[..., None, :]
    return scores.masked_fill(hidden, -math.inf).amax(-1)


def one_step_error_bound(
    patterns: Tensor,
    beta: float | Tensor,
    offset: float | Tensor,
    *,
    fixed_point_offset: float | Tensor = 0.0,
    separation: str | Separation = "softmax",
    mask: Tensor | None = None,
) -> Tensor:
    """How far one step may leave a query from the pattern that it lies near: (..., N).

        |f(xi) - x_i| <= 2 (N - 1) M exp(-beta (Delta_i - 2 r M))                       (theorem 5)

    offset: |xi - x_i|, >= 0, a number or broadcastable to (..., N). r is the larger of it and
    `fixed_point_offset`, |x_i* - x_i|. The paper takes the larger one; the proof for one step needs the
    query's alone, hence the default 0. Above 2 M the bound says nothing, since f(xi) and x_i both lie in the
    ball of radius M.
    patterns, mask: as in `separation_of`. beta: > 0, a number or one value a set, (...).
    Raises ValueError for another separation function than softmax.
    """
    store = _store(patterns, beta, separation, mask)
    return 2 * store.longest * _misplaced(store, offset, fixed_point_offset)


def jacobian_bound(
    patterns: Tensor,
    beta: float | Tensor,
    offset: float | Tensor,
    *,
    fixed_point_offset: float | Tensor = 0.0,
    separation: str | Separation = "softmax",
    mask: Tensor | None = None,
) -> Tensor:
    """Bound on the spectral norm of df/dxi at a query near x_i: (..., N).

        |J|_2 <= 2 beta N M^2 (N - 1) exp(-beta (Delta_i - 2 r M))                      (theorem 4)

    With the fixed point's offset too it bounds the mean Jacobian between the query and x_i*, by which one
    step contracts |xi - x_i*|. Arguments and errors: as `one_step_error_bound`.
    """
    store = _store(patterns, beta, separation, mask)
    factor = 2 * store.beta * store.number * store.longest.square()
    return factor * _misplaced(store, offset, fixed_point_offset)


def retrieval_error_bound(
    patterns: Tensor,
    beta: float | Tensor,
    *,
    separation: str | Separation = "softmax",
    mask: Tensor | None = None,
) -> Tensor:
    """How far the fixed point x_i* may lie from the pattern x_i that it stands for: (..., N).

        |x_i* - x_i| <= 2 e (N - 1) M exp(-beta Delta_i)                                (theorem 5)

    It holds where |x_i* - x_i| <= 1/(2 beta M) and |xi - x_i| <= 1/(2 beta M); for two patterns or more
    `storage_condition` guarantees the first. Arguments and errors: as `one_step_error_bound`.
    """
    store = _store(patterns, beta, separation, mask)
    return 2 * math.e * store.longest * _misplaced(store, 0.0, 0.0)


@dataclass(frozen=True)
class Storage:
    """Which patterns are stored, in the sense of lemmas A5 to A7.

    stored: (..., N) bool: f maps the sphere around x_i into itself, contracts there, and so has exactly one
        fixed point in it. separation: (..., N), Delta_i. required: (..., 1), the least Delta_i that suffices.
    radius: (..., 1), of the spheres, 1 / (beta N M). error_bound: (..., N), `retrieval_error_bound`.
    """

    stored: Tensor
    separation: Tensor
    required: Tensor
    radius: Tensor
    error_bound: Tensor

    def __str__(self) -> str:
        visible = self.separation[~self.separation.isnan()]
        middle = float(visible.double().median()) if visible.numel() else math.nan
        least = float(self.required.max()) if self.required.numel() else math.nan
        return (
            f"{int(self.stored.sum())} of {visible.numel()} patterns are stored; median separation {middle:.3g}, "
            f"required {least:.3g}"
        )


def storage_condition(
    patterns: Tensor,
    beta: float | Tensor,
    *,
    separation: str | Separation = "softmax",
    mask: Tensor | None = None,
) -> Storage:
    """Which patterns certainly have a fixed point of their own (lemmas A5 to A7).

        Delta_i >= 2/(beta N) + ln(2 (N - 1) N beta M^2) / beta

    It is sufficient, not necessary: many patterns that fail it are recalled well. And it can hold where beta
    is so small that the sphere around x_i, of radius 1/(beta N M), holds other patterns too; what it then says
    stands in `radius` and `error_bound`. Arguments and errors: as `one_step_error_bound`.
    """
    store = _store(patterns, beta, separation, mask)
    many = 2 * (store.number - 1) * store.number * store.beta * store.longest.square()
    required = 2 / (store.beta * store.number) + many.log() / store.beta
    return Storage(
        stored=store.delta >= required,
        separation=store.delta,
        required=required,
        radius=1 / (store.beta * store.number * store.longest),
        error_bound=2 * math.e * store.longest * _misplaced(store, 0.0, 0.0),
    )


def single_fixed_point(
    patterns: Tensor,
    beta: float | Tensor,
    *,
    separation: str | Separation = "softmax",
    mask: Tensor | None = None,
) -> Tensor:
    """Whether f certainly has one fixed point only, an average of all patterns: (...) bool.

    f contracts everywhere if beta max_i |x_i - mean|^2 < 1 (appendix A.1.5.1): sufficient, not necessary.
    Arguments and errors: as `one_step_error_bound`.
    """
    store = _store(patterns, beta, separation, mask)
    x = wide(patterns)
    if mask is not None:
        x = x.masked_fill(mask[..., None], 0.0)
    away = (x - x.sum(-2, keepdim=True) / store.number[..., None]).square().sum(-1)
    farthest = (away if mask is None else away.masked_fill(mask, 0.0)).amax(-1, keepdim=True)
    return (store.beta * farthest < 1).squeeze(-1)


@dataclass(frozen=True)
class Capacity:
    """How many random patterns can be stored (theorem 3).

    patterns: the lower bound on N, inf where it exceeds the largest float; log_patterns: its logarithm.
    c, a, b: the constants of the theorem. holds: whether its condition c >= (2 / sqrt(p))^(4 / (d - 1)) is
    met; where it is not, the theorem promises nothing.
    """

    patterns: float
    log_patterns: float
    c: float
    a: float
    b: float
    holds: bool

    def __str__(self) -> str:
        if not self.holds:
            return f"no capacity is guaranteed: the theorem's condition fails (c = {self.c:.4g})"
        return f"at least {self.patterns:.4g} random patterns (c = {self.c:.4g})"


def capacity(dim: int, beta: float = 1.0, scale: float = 1.0, failure: float = 0.001) -> Capacity:
    """How many patterns, random on a sphere, can be stored with probability 1 - failure (theorem 3).

        a = 2/(d - 1) (1 + ln(2 beta K^2 p (d - 1))),  b = 2 K^2 beta / 5,  c = b / W0(exp(a + ln b)),
        N >= sqrt(p) c^((d - 1) / 4)

    dim: d >= 2. scale: K > 0; the sphere has the radius K sqrt(d - 1). failure: p in (0, 1]. The defaults are
    those of the paper's examples (d = 75: c = 1.372; K = 3, d = 20: c = 3.1546).
    """
    check_count("dim", dim, 2)
    for name, value in (("beta", beta), ("scale", scale)):
        _check_positive(name, value)
    check_number("failure", failure, 0.0, 1.0, open_low=True)
    free = dim - 1
    a = 2 / free * (1 + math.log(2 * beta * scale**2 * failure * free))
    b = 2 * scale**2 * beta / 5
    log_c = math.log(b) - log_lambert_w(a + math.log(b))
    log_patterns = 0.5 * math.log(failure) + 0.25 * free * log_c
    holds = log_c >= 4 / free * math.log(2 / math.sqrt(failure))
    return Capacity(_exp(log_patterns), log_patterns, _exp(log_c), a, b, holds)


def log_lambert_w(y: float) -> float:
    """u = ln W0(exp(y)), the root of exp(u) + u = y, to rounding, for any finite y.

    Newton's method; the left side is convex and increasing and the start lies above the root, so that it falls
    monotonically. In the logarithm, since exp(y) itself may be more than a float holds.
    """
    if not math.isfinite(y):
        raise ValueError(f"y must be finite, got {y!r}")
    u = math.log(y) if y > 1 else y
    while True:
        power = math.exp(u)
        lower = u - (power + u - y) / (power + 1)
        if not lower < u - 1e-16 * max(abs(u), 1.0):
            return lower
        u = lower


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(1.7e308) else math.inf


class _Store(NamedTuple):
    """What the bounds need: Delta_i (..., N); N, M and beta (..., 1)."""

    delta: Tensor
    number: Tensor
    longest: Tensor
    beta: Tensor


def _store(
    patterns: Tensor, beta: float | Tensor, separation: str | Separation, mask: Tensor | None
) -> _Store:
    _check_softmax(separation)
    delta = separation_of(patterns, mask=mask)
    norms = torch.linalg.vector_norm(wide(patterns), dim=-1)
    count = torch.full_like(norms[..., :1], norms.shape[-1])
    if mask is not None:
        norms = norms.masked_fill(mask, 0.0)
        count = (~mask).sum(-1, keepdim=True).to(norms.dtype).expand_as(count)
    _check_positive("beta", beta)
    if isinstance(beta, Tensor):
        try:
            laid = beta.to(norms).expand(norms.shape[:-1])[..., None]
        except RuntimeError:
            raise ValueError(
                f"beta of shape {tuple(beta.shape)} does not broadcast to the sets of patterns "
                f"{tuple(norms.shape[:-1])}; give a number or one value a set"
            ) from None
    else:
        laid = torch.full_like(count, beta)
    return _Store(delta, count, norms.amax(-1, keepdim=True), laid)


def _misplaced(store: _Store, offset: float | Tensor, fixed_point_offset: float | Tensor) -> Tensor:
    """(N - 1) exp(-beta (Delta_i - 2 r M)), which bounds the weight of all other patterns: (..., N)."""
    reach = torch.maximum(
        _offset("offset", offset, store.delta),
        _offset("fixed_point_offset", fixed_point_offset, store.delta),
    )
    # The factor inside the exponential: N - 1 = 0 times exp(inf) would be NaN.
    return ((store.number - 1).log() - store.beta * (store.delta - 2 * reach * store.longest)).exp()


def _offset(name: str, value: float | Tensor, delta: Tensor) -> Tensor:
    laid = torch.as_tensor(value, dtype=delta.dtype, device=delta.device)
    if not bool(((laid >= 0) & laid.isfinite()).all()):
        raise ValueError(f"{name} must hold finite distances >= 0, got {value!r}")
    try:
        return laid.expand_as(delta)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(laid.shape)} does not broadcast to one distance a pattern, "
            f"{tuple(delta.shape)}"
        ) from None


def _check_softmax(separation: str | Separation) -> None:
    if type(make_separation(separation)) is not Softmax:
        raise ValueError(
            f"the bounds hold for separation='softmax' only, got {separation!r}; classify() and "
            "spectral_radius() work for every separation function"
        )


def _check_patterns(patterns: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as (..., N), or None; errors for what is no store."""
    check_float_tensor("patterns", patterns)
    if patterns.ndim < 2 or not patterns.shape[-1] or not patterns.shape[-2]:
        raise ValueError(
            f"patterns must be (..., N, d) with at least one pattern of at least one number, got the shape "
            f"{tuple(patterns.shape)}"
        )
    bad = ~patterns.isfinite().all(-1)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor (True = ignore the pattern), got {kind}")
        if mask.shape[-1:] != patterns.shape[-2:-1] or mask.ndim > patterns.ndim - 1:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be {tuple(patterns.shape[:-1])}")
        mask = mask.expand(patterns.shape[:-1])
        bad = bad & ~mask
    if bool(bad.any()):
        raise ValueError(f"patterns hold NaN or inf in {int(bad.sum())} rows; remove or mask them")
    return mask


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        check_float_tensor(name, value)
        good = bool(((value > 0) & value.isfinite()).all())
    else:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = good and math.isfinite(float(value)) and float(value) > 0  # type: ignore[arg-type]
    if not good:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
