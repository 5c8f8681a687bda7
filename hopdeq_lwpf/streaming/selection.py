"""Order statistics of the scores of all stored patterns, a row a query, without keeping the scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hopdeq_lwpf.streaming.attention import Scores, Stored, parts
from hopdeq_lwpf.streaming.ranks import Ranks

DIGIT = 11  # bits of a number that one pass settles: 2,048 counters a row
# Of many rows fewer, so that the counters take no more than the scores of the smallest block.
FEW_ROWS, SHORT_DIGIT = 1024, 8


def median(scores: Scores, stored: Stored, *, whole: bool = False) -> Tensor:
    """The lower median of the unmasked scores, exactly: (B, 1), or a scalar over all rows with `whole`.

    A radix selection: numbers are compared as integers of the same order, 11 bits a pass, so 3 passes in float32 and 6
    in float64; from 1,025 rows on 8 bits, 4 and 8 passes. 0 for a row that is masked entirely, NaN for one that holds
    a NaN.
    """
    z = scores.z
    bits = 8 * z.element_size()
    rows = 1 if whole else len(z)
    prefix = torch.zeros(rows, dtype=torch.int64, device=z.device)
    rank, done = None, 0
    spoilt = torch.zeros(rows, dtype=z.dtype, device=z.device)
    while done < bits:
        width = min(DIGIT if rows <= FEW_ROWS else SHORT_DIGIT, bits - done)
        counts = torch.zeros((rows, 1 << width), dtype=torch.int64, device=z.device)
        for part in parts(stored, z):
            block = scores(part.patterns)
            if rank is None:
                spoilt += _rowwise(block.isnan().to(z.dtype), whole)
            visible = None if part.mask is None else ~part.mask.expand_as(block)
            counts += _count(_ordered(block), visible, prefix, done, width, whole)
        counts = stored.ranks.sum(counts)
        if rank is None:
            spoilt = stored.ranks.sum(spoilt)
            total = counts.sum(1)
            rank = (total - 1).clamp_min(0) // 2
        below = counts.cumsum(1)
        digit = (below <= rank[:, None]).sum(1).clamp_max(counts.shape[1] - 1)
        rank = rank - torch.where(digit > 0, below.gather(1, (digit - 1).clamp_min(0)[:, None])[:, 0], 0)
        prefix = (prefix << width) | digit
        done += width
    value = _number(prefix, z.dtype).masked_fill(total == 0, 0.0).masked_fill(spoilt > 0, math.nan)
    return value.reshape(()) if whole else value[:, None]


def _rowwise(block: Tensor, whole: bool) -> Tensor:
    return block.sum().reshape(1) if whole else block.sum(-1)


def _ordered(block: Tensor) -> Tensor:
    """Integers in the order of the numbers; the sign bit is that of the order."""
    kind = torch.int32 if block.element_size() == 4 else torch.int64
    whole = (block + 0.0).view(kind)  # -0.0 becomes 0.0
    return whole ^ ((whole >> (8 * block.element_size() - 1)) & torch.iinfo(kind).max)


def _number(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers whose digits, with the sign bit turned, were collected in `key`."""
    bits = 8 * dtype.itemsize
    kind = torch.int32 if bits == 32 else torch.int64
    sign = torch.iinfo(kind).min
    whole = (key + sign).to(kind) if bits == 32 else key ^ sign
    whole = whole ^ ((whole >> (bits - 1)) & torch.iinfo(kind).max)
    return whole.view(dtype)


def _count(
    keys: Tensor, visible: Tensor | None, prefix: Tensor, done: int, width: int, whole: bool
) -> Tensor:
    """How often each next digit follows the prefix of its row: (B, n) -> (rows, 2^width)."""
    bits = 8 * keys.element_size()
    rows, size = len(prefix), 1 << width
    digit = (keys >> (bits - done - width)) & (size - 1)
    if not done:
        digit = digit ^ (size >> 1)  # the sign bit turned, so that negative numbers come first
    row = (
        torch.zeros_like(digit[:, :1])
        if whole
        else torch.arange(rows, device=keys.device, dtype=keys.dtype)[:, None]
    )
    here = visible
    if done:
        front = keys >> (bits - done)
        start = prefix - (1 << (done - 1))  # the sign bit turned back
        same = front == start.to(keys.dtype)[:, None]
        here = same if visible is None else same & visible
    flat = digit + row * size
    flat = flat.reshape(-1) if here is None else flat[here]
    return torch.bincount(flat, minlength=rows * size).reshape(rows, size)


def largest(scores: Scores, stored: Stored, k: int) -> tuple[Tensor, Tensor]:
    """The k largest unmasked scores and the numbers of their patterns, (B, k) each; of equal ones the lowest numbers.

    In falling order. Where there are fewer, scores of -inf with the number -1; NaN in a row that holds one.
    """
    z = scores.z
    top = z.new_full((len(z), k), -math.inf)
    index = torch.full((len(z), k), -1, dtype=torch.int64, device=z.device)
    for part in parts(stored, z):
        block = scores(part.patterns)
        if part.mask is not None:
            block = block.masked_fill_(part.mask, -math.inf)
        peak = block.amax(-1)
        top = torch.where(peak.isnan()[:, None], math.nan, top)
        # Few blocks hold anything new once the first ones were seen.
        rows = (peak > top[:, -1]).nonzero().squeeze(1)
        if len(rows):
            news = _first_of_block(block.index_select(0, rows), k, stored.start + part.start)
            old = top.index_select(0, rows), index.index_select(0, rows)
            best = _best(torch.cat([old[0], news[0]], 1), torch.cat([old[1], news[1]], 1), k)
            top, index = top.index_copy(0, rows, best[0]), index.index_copy(0, rows, best[1])
    return _merge(top, index, stored.ranks, k)


def _merge(top: Tensor, index: Tensor, ranks: Ranks, k: int) -> tuple[Tensor, Tensor]:
    if ranks.size == 1:
        return top, index
    return _best(torch.cat(ranks.gather(top), 1), torch.cat(ranks.gather(index), 1), k)


def _first_of_block(block: Tensor, k: int, start: int) -> tuple[Tensor, Tensor]:
    """The k largest of a block with their numbers, of equal ones those that come first."""
    k = min(k, block.shape[-1])
    top, place = block.topk(k, -1)
    ties = ((block == top[:, -1:]).sum(-1) > (top == top[:, -1:]).sum(-1)) & (top[:, -1] > -math.inf)
    if bool(ties.any()):  # topk takes any of them
        ordered, places = block[ties].sort(dim=-1, descending=True, stable=True)
        top[ties], place[ties] = ordered[:, :k], places[:, :k]
    return top, torch.where(top > -math.inf, place + start, -1)


def _best(top: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, by falling score and rising number; rows have at least k."""
    by_number = index.argsort(dim=-1)
    top, index = top.gather(1, by_number), index.gather(1, by_number)
    top, order = top.sort(dim=-1, descending=True, stable=True)
    return top[:, :k], index.gather(1, order)[:, :k]


def first_equal(scores: Scores, stored: Stored, value: Tensor) -> Tensor:
    """The number of the first unmasked pattern whose score is `value` (B, 1), int64 (B,); -1 where there is none."""
    none = torch.iinfo(torch.int64).max
    first = torch.full((len(scores.z),), none, dtype=torch.int64, device=scores.z.device)
    for part in parts(stored, scores.z):
        equal = scores(part.patterns) == value
        if part.mask is not None:
            equal &= ~part.mask
        place = torch.where(equal.any(-1), equal.to(torch.uint8).argmax(-1) + stored.start + part.start, none)
        first = torch.minimum(first, place)
    first = -stored.ranks.max(-first)
    return torch.where(first == none, -1, first)
