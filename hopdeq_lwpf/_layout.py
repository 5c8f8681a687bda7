"""Checks and layout of what a retrieval is given: numbers or tensors, sets of patterns, masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hopdeq_lwpf._types import check_float_tensor, check_same_kind, plain, wide


def attach(module: nn.Module, name: str, value: float | Tensor) -> None:
    """A Parameter is learned, a tensor moves with the module, a number stays a number."""
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif isinstance(value, Tensor):
        module.register_buffer(name, value)
    else:
        setattr(module, name, float(value))


def shown(value: float | Tensor) -> str:
    """A number, or those of a tensor in four digits, for a repr; "..." on the meta device, where there are none."""
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_meta:
        return "..."
    numbers = ", ".join(f"{number:.4g}" for number in plain(value.detach()).reshape(-1).tolist())
    return f"[{numbers}]" if value.ndim else numbers


def lowest(value: float | Tensor) -> float:
    """The number, or the smallest entry of the tensor; inf on the meta device, where there is none."""
    if not isinstance(value, Tensor):
        return value
    value = plain(value)
    return math.inf if value.is_meta else float(value.detach().min())


def check_positive(name: str, value: float | Tensor) -> None:
    check_number(name, value)
    if not lowest(value) > 0:
        raise ValueError(f"{name} must be > 0, got {value!r}")


def check_number(name: str, value: float | Tensor) -> None:
    """Raise unless it is a finite number or a tensor of them."""
    if isinstance(value, Tensor):
        check_float_tensor(name, value)
        value = plain(value)
        if not value.numel() or not (value.is_meta or bool(value.isfinite().all())):
            raise ValueError(f"{name} must hold finite numbers, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    elif not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def lay(name: str, value: float | Tensor, query: Tensor) -> float | Tensor:
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


def check_input(query: Tensor, patterns: Tensor, mask: Tensor | None) -> torch.Size:
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


def without_padding(rows: Tensor, mask: Tensor) -> Tensor:
    """Patterns or values with 0 where the mask, if it has one entry a pattern, removes one: 0 times NaN is NaN."""
    return rows.masked_fill(mask.unsqueeze(-1), 0.0) if mask.ndim == rows.ndim - 1 else rows


def lay_mask(mask: Tensor, batch: torch.Size, patterns: Tensor) -> Tensor:
    """(N,) as it is, one entry a query and pattern (B, N) otherwise; patterns as the caller gave them."""
    if mask.ndim <= 1 and patterns.ndim <= 2:
        return mask
    mask = mask if mask.ndim == len(batch) + 1 else mask.unsqueeze(-2)
    return mask.expand(*batch, -1).reshape(-1, patterns.shape[-2])


def group(batch: torch.Size, patterns: Tensor) -> Tensor:
    """Sets of patterns (or values) as (G, N, d), for queries of this batch shape seen as (G, L, d)."""
    rows = patterns.shape[-2:]
    target = batch if patterns.ndim == len(batch) + 2 else batch[:-1]
    return patterns.expand(*target, *rows).reshape(-1, *rows)


def set_number(members: Tensor, start: int = 0) -> Tensor:
    """A number for the set of columns that are 1, others being 0: (B, N) -> (B,) float64.

    Different sets have different numbers but by chance, one of some 255. The numbers are sums of integers and exact,
    so that they depend neither on the batch nor on the blocks that they are computed in. start: of the first column.
    """
    places = torch.arange(
        start + 1, start + members.shape[-1] + 1, dtype=torch.float64, device=members.device
    )
    sizes = 1 + (1e4 * places.sin()).frac().abs().mul(255).floor()
    # 2**16 sizes of up to 255 add up exactly in float32.
    exact = wide(members) if members.shape[-1] <= 2**16 else members.double()
    device = members.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # half precision would not tell neighbouring sets apart
            return (exact @ sizes.to(exact.dtype)).double()
    return (exact @ sizes.to(exact.dtype)).double()
