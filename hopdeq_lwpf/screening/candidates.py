"""Which patterns are candidates of a query, and what is left of the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hopdeq_lwpf.forgetting import PFU, Forgetting
from hopdeq_lwpf.retrieval import Retrieval, StreamedContext
from hopdeq_lwpf.retrieval.streamed import gather
from hopdeq_lwpf.screening.narrow import Candidates
from hopdeq_lwpf.separation import Softmax1
from hopdeq_lwpf.streaming.attention import Attended, parts


class Nearby:
    """Watches a pass for the patterns that score not much less than the best one of each row."""

    def __init__(self, least: Tensor, most: int) -> None:
        """least: (B, 1), what a candidate scores at least. most: candidates of a row; the best ones are kept."""
        self.least, self.most, self.used = least, most, 0
        # One piece of memory for all: what each block would leave behind would split the memory of the next one.
        room = 5 * most * len(least)
        self.row = torch.empty(room, dtype=torch.int64, device=least.device)
        self.index, self.score = torch.empty_like(self.row), least.new_empty(room)

    def __call__(self, start: int, scores: Tensor) -> None:
        """Remember the candidates of one block."""
        above = scores > self.least
        crowded = (above.sum(-1) > 4 * self.most).nonzero().squeeze(1)
        if len(crowded):
            lowest = (
                scores.index_select(0, crowded)
                .topk(self.most, -1, sorted=False)
                .values.amin(-1, keepdim=True)
            )
            self.least = self.least.index_copy(0, crowded, lowest)
            above = scores > self.least
        rows, places = above.nonzero(as_tuple=True)
        if self.used + len(rows) > len(self.row):
            self.sort()
        here = slice(self.used, self.used + len(rows))
        self.row[here], self.index[here], self.score[here] = rows, places + start, scores[rows, places]
        self.used += len(rows)

    def sort(self) -> Tensor:
        """Keep the best of each row, by row and falling score; how many there are in each, (B,)."""
        row, index, score = (part[: self.used] for part in (self.row, self.index, self.score))
        order = score.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        count = torch.bincount(row, minlength=len(self.least))
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row[order]]
        order = order[place < self.most]
        kept = row[order], index[order], score[order]
        self.used = len(order)
        for whole, part in zip((self.row, self.index, self.score), kept, strict=True):
            whole[: self.used] = part
        # A row that is full takes only better ones.
        full = (count >= self.most)[:, None]
        last = (count.clamp_max(self.most).cumsum(0) - 1).clamp_min(0)
        if self.used:
            self.least = torch.where(full, torch.maximum(self.least, self.score[last][:, None]), self.least)
        return count.clamp_max(self.most)

    def table(self) -> tuple[Tensor, Tensor]:
        """Numbers of the candidates of each row, and where there are none: (B, k) int64, (B, k) bool."""
        count = self.sort()
        row = self.row[: self.used]
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        table = torch.full((len(count), max(1, int(count.max()))), -1, dtype=torch.int64, device=row.device)
        table[row, place] = self.index[: self.used]
        return table.clamp_min(0), table < 0


def collect(
    f: Retrieval, z: Tensor, x: StreamedContext, found: Attended, near: Nearby, radius: float, trust: float
) -> tuple[Candidates, Tensor]:
    """The small problem of every row at the reference z, and which share of the weight it merges: (B,).

    found: of the pass at z that `near` has watched. radius: length of the longest pattern.
    """
    index, padding = near.table()
    patterns = gather(x, index.reshape(-1)).to(z).reshape(*index.shape, -1)
    scores = x.beta * torch.bmm(patterns, z[:, :, None])[:, :, 0]
    value, kept = f.forgetting.project(scores, x.threshold, padding)
    lse = found.lse[:, None]
    weights = (value.masked_fill(padding, -math.inf) - lse).exp()
    held = weights if kept is None else weights * kept
    among = (~padding).sum(-1, keepdim=True)
    visible = x.total if x.mask is None else x.total - int(x.mask.sum())
    # Forgotten patterns are counted, not stored.
    lost = (visible - found.kept)[:, None] - (0 if kept is None else among - kept.sum(-1, keepdim=True))
    lost = lost.to(z)
    limit, fill = _levels(f.forgetting, x.threshold, value)
    forgotten, doubtful = (lost.clamp_min(0).log() + level for level in (fill, torch.maximum(limit, fill)))
    if isinstance(f.separation, Softmax1):
        forgotten = torch.logaddexp(forgotten, torch.zeros_like(forgotten))
    mass = 1.0 - weights.sum(-1, keepdim=True) - (forgotten - lse).exp()
    # Less than rounding leaves of a difference to 1 says nothing.
    real = mass > 64 * torch.finfo(mass.dtype).eps
    rest = found.image - torch.bmm(held[:, None], patterns)[:, 0]
    mean = torch.where(real, rest / torch.where(real, mass, 1.0), 0.0)
    mean = mean * (radius / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp_min(radius))
    share = torch.where(real, mass.clamp_min(0).log() + lse, -math.inf)
    small = Candidates(
        patterns, padding, x.beta, x.threshold, x.injected, z, mean, share, forgotten, doubtful, radius, trust
    )
    return small, mass[:, 0]


def longest(x: StreamedContext, like: Tensor) -> float:
    """The length of the longest pattern that is not masked."""
    largest = 0.0
    for part in parts(x.stored(), like):
        largest = max(largest, float(part.patterns.square().sum(-1).amax()))
    return math.sqrt(largest)


def _levels(unit: Forgetting, threshold: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The score up to which the unit forgets and what it puts in its place, (B, 1) or scalars."""
    zero = like.new_zeros(())
    if not isinstance(unit, PFU):
        return zero, zero
    limit = zero + float(unit.threshold) if threshold is None else threshold
    return limit, limit if unit.bias == "threshold" else zero + float(unit.bias)
