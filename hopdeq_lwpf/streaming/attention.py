"""Exact attention over blocks of stored patterns: an online softmax with forgetting.

Memory is that of one block of scores, (B, n), whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hopdeq_lwpf._layout import set_number
from hopdeq_lwpf._types import check_float_tensor, wide
from hopdeq_lwpf.streaming.ranks import ALONE, Ranks
from hopdeq_lwpf.streaming.sources import PatternSource, block_size

# Sees the scores of one block, (B, n), and the number of its first pattern.
Watcher = Callable[[int, Tensor], None]


class Forgotten(NamedTuple):
    """Which scores are kept, and what the others become. A score is kept if it is above the limit or always kept."""

    limit: Tensor | None  # (B, 1) or a scalar; None: none is kept for its size
    fill: Tensor  # (B, 1) or a scalar: D of the forgotten ones; may require grad
    always: Tensor | None = None  # (B, k) int64: numbers of patterns that are kept whatever they score


class Stored(NamedTuple):
    """What is attended to: this process's patterns with what belongs to each of them."""

    patterns: Tensor | PatternSource  # (N, d)
    values: Tensor | PatternSource | None  # (N, dv), read out beside the patterns
    mask: Tensor | None  # bool (N,) or (B, N), True = ignore
    start: int = 0  # number of the first pattern among those of all ranks
    ranks: Ranks = ALONE
    block: int | None = None


class Attended(NamedTuple):
    """What one pass gives, a row a query; None where it was not asked for."""

    image: Tensor  # (B, d): sum of w x over the kept patterns
    read: Tensor | None  # (B, dv): sum of w v
    lse: Tensor  # (B,): log of the denominator, the Lagrangian; 0 where every pattern is masked
    mass: Tensor  # (B,): sum of w over the kept patterns
    kept: Tensor  # (B,): how many are kept
    first: Tensor | None = None  # (B,) int64: the kept pattern of largest score, lowest number of equal ones
    top: Tensor | None = None  # (B,): its score; -inf where none is kept
    low: Tensor | None = None  # (B,): no kept score is smaller
    visible: Tensor | None = None  # (B,): how many are not masked
    which: Tensor | None = None  # (B,): a number for the set of those that are kept


@dataclass(frozen=True)
class Scores:
    """s of queries and a block: beta x.z, or -(beta/2) |z - x|^2."""

    z: Tensor  # (B, d), float32 or wider
    beta: Tensor | float  # a number, a scalar or (B, 1)
    euclidean: bool = False

    def __call__(self, block: Tensor) -> Tensor:
        """(n, d) -> (B, n), new memory that may be written to."""
        with torch.autocast(block.device.type, enabled=False):
            if not self.euclidean:
                return (self.z * self.beta) @ block.T
            return self.halves(block).mul_(-self.beta)

    def halves(self, block: Tensor) -> Tensor:
        """|z - x|^2 / 2, not below 0: (B, n)."""
        half = torch.addmm(0.5 * block.square().sum(-1), self.z, block.T, alpha=-1)
        return half.add_(0.5 * self.z.square().sum(-1, keepdim=True)).clamp_min_(0.0)


class Part(NamedTuple):
    """One block as it is looked at."""

    start: int  # of this process's patterns
    patterns: Tensor  # (n, d) in the dtype of the scores, masked ones 0
    values: Tensor | None
    mask: Tensor | None  # (n,) or (B, n)


def parts(stored: Stored, like: Tensor) -> Iterator[Part]:
    """The blocks with their values and masks, converted to dtype and device of `like` (B, d)."""
    size = (
        stored.block or getattr(stored.patterns, "block", None) or block_size(len(like), like.element_size())
    )
    start = 0
    for patterns in _blocks(stored.patterns, size):
        stop = start + len(patterns)
        values = None if stored.values is None else _rows(stored.values, start, stop).detach().to(like)
        mask = None if stored.mask is None else stored.mask[..., start:stop]
        block = patterns.detach().to(like)
        if mask is not None and mask.ndim == 1:  # such a pattern may hold anything, and 0 times NaN is NaN
            block = block.masked_fill(mask[:, None], 0.0)
            values = None if values is None else values.masked_fill(mask[:, None], 0.0)
        yield Part(start, block, values, mask)
        start = stop


def _blocks(patterns: Tensor | PatternSource, size: int) -> Iterator[Tensor]:
    return iter(patterns.split(size)) if isinstance(patterns, Tensor) else patterns.blocks(size)


def _rows(values: Tensor | PatternSource, start: int, stop: int) -> Tensor:
    # Only sources that lie in one tensor can be sliced beside the patterns; see `check_values`.
    whole: Tensor = values if isinstance(values, Tensor) else values.tensor  # type: ignore[attr-defined]
    return whole[start:stop]


def hide_(block: Tensor, part: Part) -> Tensor:
    """The scores of a block, -inf where masked; in place."""
    if part.mask is None:
        return block
    if part.mask.ndim == 1:  # a sum is several times faster on a CPU than a selection
        return block.add_(block.new_zeros(block.shape[-1:]).masked_fill_(part.mask, -math.inf))
    return block.masked_fill_(part.mask, -math.inf)


def keep_(forgotten: Forgotten | None, block: Tensor, part: Part, start: int) -> tuple[Tensor | None, Tensor]:
    """1 for what is kept of a block of scores, else 0, (B, n) or (n,), None for all; and its largest score, (B,).

    start: number of the block's first pattern. The scores must be -inf where masked; those of what is not kept may be
    written over, those that are kept stay as they are. NaN is passed on.
    """
    if forgotten is None:
        return None if part.mask is None else (~part.mask).to(block), block.amax(-1)
    limit = forgotten.limit
    if forgotten.always is None and limit is not None:
        kept = (block - limit).relu_().sign_()
        top = block.amax(-1)
        return kept, torch.where(top <= limit.reshape(-1), -math.inf, top)
    out = torch.ones_like(block, dtype=torch.bool) if limit is None else block <= limit
    if forgotten.always is not None:
        here = (forgotten.always >= start) & (forgotten.always < start + block.shape[-1])
        rows, places = here.nonzero(as_tuple=True)
        out.index_put_((rows, forgotten.always[rows, places] - start), here.new_zeros(()))
    return (~out).to(block), block.masked_fill_(out, -math.inf).amax(-1)


def exp_(block: Tensor, shift: Tensor, kept: Tensor | None) -> Tensor:
    """exp(scores - shift) of what is kept, in place: (B, n) with (B,); no kept score exceeds its shift.

    Shares below exp(-80) in float32 stay that: numbers without full precision make products several times slower, and
    millions of them do not add up to a rounding error.
    """
    floor = math.log(torch.finfo(block.dtype).tiny) + 8.0
    weights = block.sub_(shift[:, None]).clamp_(floor, 0.0).exp_()
    return weights if kept is None else weights.mul_(kept)


class _Sums:
    """The running sums of one pass, in units of exp(peak)."""

    def __init__(self, z: Tensor, dv: int | None) -> None:
        rows, width = z.shape
        self.peak = z.new_full((rows,), -math.inf)
        self.total = z.new_zeros(rows)
        self.image = z.new_zeros(rows, width)
        self.read = None if dv is None else z.new_zeros(rows, dv)
        # Float32 cannot count beyond 2**24.
        self.kept, self.visible, self.which = z.new_zeros((3, rows), dtype=torch.float64)

    def add(self, block: Tensor, top: Tensor, kept: Tensor | None, part: Part | None) -> None:
        """A block of scores, which are written over; top: (B,), the largest kept one. part: None sums no patterns."""
        weights = exp_(block, self.raise_to(top), kept)
        self.total += weights.sum(-1)
        if part is None:
            return
        # Products of three rows or fewer with long sums were measured to err ten times as much in float32 on a CPU.
        few = len(weights) < 4
        weights = functional.pad(weights, (0, 0, 0, 4 - len(weights))) if few else weights
        _add(self.image, weights, part.patterns)
        if self.read is not None and part.values is not None:
            _add(self.read, weights, part.values)

    def raise_to(self, top: Tensor) -> Tensor:
        """Make exp(the larger of peak and top) the unit; what scores are to be lessened by, finite."""
        peak = torch.maximum(self.peak, top)
        shift = torch.where(peak == -math.inf, 0.0, peak)
        shrink = (self.peak - shift).exp_()
        self.peak = peak
        self.total *= shrink
        self.image *= shrink[:, None]
        if self.read is not None:
            self.read *= shrink[:, None]
        return shift

    def merge(self, ranks: Ranks) -> None:
        """The sums of all ranks."""
        if ranks.size == 1:
            return
        self.raise_to(ranks.max(self.peak.clone()))
        columns = [self.total[:, None], self.image]
        columns += [] if self.read is None else [self.read]
        sums = ranks.sum(torch.cat(columns, 1))
        total, self.image, *rest = sums.split([part.shape[1] for part in columns], 1)
        self.total = total[:, 0]
        self.kept, self.visible, self.which = ranks.sum(torch.stack((self.kept, self.visible, self.which)))
        self.read = rest[0] if rest else None


def sweep(
    scores: Scores,
    stored: Stored,
    forgotten: Forgotten | None,
    empty: bool,
    look: bool,
    weighted: bool = True,
    watch: Watcher | None = None,
) -> Attended:
    """Softmax attention to all stored patterns with forgetting, in one pass, without gradient.

    empty: whether the softmax has one more score, 0, with nothing behind it (softmax1). look: also `first`, `top` and
    `low`. weighted: whether patterns and values are summed; without, image and read-out are 0, which saves half of the
    time where only `lse` is wanted. watch: sees the scores of every block before anything is forgotten.
    """
    sums = _Sums(scores.z, None if stored.values is None else stored.values.shape[1])
    found = _Found(scores.z) if look else None
    for part in parts(stored, scores.z):
        block = scores(part.patterns)
        if found is not None:
            found.bound(block)
        block = hide_(block, part)
        count = block.shape[-1]
        sums.visible += count if part.mask is None else count - part.mask.sum(-1)
        if watch is not None:
            watch(stored.start + part.start, block)
        kept, top = keep_(forgotten, block, part, stored.start + part.start)
        if forgotten is not None and kept is not None:
            sums.kept += kept.sum(-1)
            sums.which += set_number(kept, stored.start + part.start)
        if found is not None:
            found.see(block, top, stored.start + part.start)
        sums.add(block, top, kept, part if weighted else None)
    sums.merge(stored.ranks)
    if found is not None:
        found.merge(stored.ranks)
    if forgotten is None:
        sums.kept = sums.visible
    return _finish(sums, forgotten, empty, found)


def _add(sums: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Add weights @ rows to the sums, in place; there may be more weights than sums, which are padding."""
    if len(weights) == len(sums):
        sums.addmm_(weights, rows)
    else:
        sums += (weights @ rows)[: len(sums)]


def _finish(sums: _Sums, forgotten: Forgotten | None, empty: bool, found: _Found | None) -> Attended:
    """Sums over kept patterns -> the result: forgotten scores and the empty one enter the denominator only."""
    mass = sums.total.clone()
    missing = (sums.visible - sums.kept).to(mass)
    extra = []
    if forgotten is not None:
        fill = forgotten.fill.detach().to(mass).reshape(-1).expand_as(mass)
        extra.append((missing, torch.where(missing > 0, fill, -math.inf)))
    if empty:
        extra.append((torch.ones_like(mass), torch.zeros_like(mass)))
    for count, score in extra:
        before = sums.peak
        shift = sums.raise_to(score)
        mass = mass * (before - shift).exp_()
        sums.total = sums.total + count * (score - shift).exp()
    nothing = sums.total == 0  # every pattern is masked
    total = sums.total.masked_fill(nothing, 1.0)
    lse = (sums.total.log() + torch.where(sums.peak == -math.inf, 0.0, sums.peak)).masked_fill(nothing, 0.0)
    read = None if sums.read is None else sums.read / total[:, None]
    whole = Attended(
        sums.image / total[:, None],
        read,
        lse,
        mass / total,
        sums.kept,
        visible=sums.visible,
        which=sums.which,
    )
    return whole if found is None else whole._replace(first=found.first, top=found.top, low=found.low)


class _Found:
    """The largest kept score of each row, the number of the first pattern that has it, and a bound of the smallest."""

    def __init__(self, z: Tensor) -> None:
        self.top = z.new_full(z.shape[:1], -math.inf)
        self.low = z.new_full(z.shape[:1], math.inf)
        self.first = torch.zeros(z.shape[:1], dtype=torch.int64, device=z.device)

    def bound(self, block: Tensor) -> None:
        """Scores of a block before any is taken away: none is smaller."""
        self.low = torch.minimum(self.low, block.amin(-1))

    def see(self, block: Tensor, top: Tensor, start: int) -> None:
        """A block of scores, and the largest kept one of each row, (B,)."""
        # Its place is looked for only where it is a new record, which it soon is in few rows.
        rows = (top > self.top).nonzero().squeeze(1)
        if len(rows):
            self.first = self.first.index_copy(0, rows, block.index_select(0, rows).argmax(-1) + start)
            self.top = torch.maximum(self.top, top)

    def merge(self, ranks: Ranks) -> None:
        """Those of all ranks."""
        if ranks.size == 1:
            return
        mine = self.top.clone()
        self.top = ranks.max(self.top)
        # The lowest number among those with the top score.
        here = torch.where(mine == self.top, -self.first, torch.iinfo(torch.int64).min)
        self.first = -ranks.max(here)
        self.low = -ranks.max(-self.low)


def check_values(values: Any, patterns: Tensor | PatternSource) -> None:
    """Raise unless there is one value a pattern, in one tensor or mapped file."""
    if not isinstance(values, Tensor) and not (
        isinstance(values, PatternSource) and hasattr(values, "tensor")
    ):
        told = repr(values) if isinstance(values, PatternSource) else type(values).__name__
        raise TypeError(
            f"values must be a tensor or open_patterns(file), to be read beside the patterns; got {told}"
        )
    if isinstance(values, Tensor):
        check_float_tensor("values", values)
    if values.ndim != 2 or len(values) != len(patterns):
        raise ValueError(
            f"values must have one row a pattern, ({len(patterns)}, dv); got {tuple(values.shape)}"
        )


def widened(scores: Scores) -> Scores:
    """In float32 or wider, where sums over many patterns belong."""
    beta = wide(scores.beta) if isinstance(scores.beta, Tensor) else scores.beta
    return Scores(wide(scores.z), beta, scores.euclidean)
