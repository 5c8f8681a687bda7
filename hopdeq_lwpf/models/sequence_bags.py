"""Bags of sequences, checked, without their padding; and the few of each that go on."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hopdeq_lwpf.data.repertoires import PADDING
from hopdeq_lwpf.models.sequences import check_codes, count_letters, first_entry


class SequenceBags(NamedTuple):
    """The sequences of B bags, those of one bag after the other; M in all."""

    codes: Tensor  # (M, L)
    lengths: Tensor  # (M,) int64
    counts: Tensor | None  # (M,)
    places: Tensor  # (M,) int64, ascending: bag * width + column
    sizes: Tensor  # (B,) int64: sequences of each bag
    width: int  # columns that the bags came in

    def rows(self, start: int, stop: int) -> SequenceBags:
        """A run of the sequences, as one bag."""
        counts = None if self.counts is None else self.counts[start:stop]
        codes, lengths, places = (part[start:stop] for part in (self.codes, self.lengths, self.places))
        return SequenceBags(codes, lengths, counts, places, self.sizes.new_tensor([len(codes)]), self.width)

    def take(self, rows: Tensor) -> SequenceBags:
        """Only these sequences, (K,) ascending."""
        counts = None if self.counts is None else self.counts[rows]
        places = self.places[rows]
        sizes = torch.bincount(places // max(self.width, 1), minlength=len(self.sizes))
        return SequenceBags(self.codes[rows], self.lengths[rows], counts, places, sizes, self.width)

    def slots(self) -> tuple[Tensor | None, int]:
        """Where each sequence stands in the bags padded to the largest, flat (M,); None: as they are. And that size."""
        largest = int(self.sizes.max()) if len(self.sizes) else 0
        if len(self.codes) == largest * len(self.sizes):
            return None, largest
        bag = self.places // max(self.width, 1)
        starts = self.sizes.cumsum(0) - self.sizes
        return bag * largest + torch.arange(len(self.codes), device=bag.device) - starts[bag], largest

    def padded(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """(M, ...) -> (B, K, ...), K the largest bag."""
        slots, largest = self.slots()
        shape = (len(self.sizes), largest, *values.shape[1:])
        if slots is None:
            return values.reshape(shape)
        flat = values.new_full((shape[0] * largest, *values.shape[1:]), fill)
        return flat.index_copy(0, slots, values).reshape(shape)

    def absent(self) -> Tensor | None:
        """(B, K) bool: True where `padded` has no sequence; None where all bags have one size."""
        slots, largest = self.slots()
        if slots is None:
            return None
        return torch.arange(largest, device=slots.device) >= self.sizes[:, None]

    def columns(self) -> Tensor:
        """(B, K) int64: the columns that the sequences came in; `width` where `padded` has none."""
        return self.padded(self.places % max(self.width, 1), self.width)


def unpack(
    data: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    drop_uncounted: bool = False,
) -> SequenceBags:
    """Bags from data (B, N, L), mask, lengths and counts (B, N), checked.

    drop_uncounted: a sequence of count 0 is none. What is masked may be anything.
    Raises TypeError or ValueError naming the first entry that cannot be.
    """
    if not isinstance(data, Tensor) or data.ndim != 3:
        shape = tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__
        raise (ValueError if isinstance(data, Tensor) else TypeError)(
            f"data must be a tensor (B, N, L), got {shape}; one bag: unsqueeze(0)"
        )
    clean, absent = data, None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, True = no sequence, got {kind}")
        absent = _fit("mask", mask, data)
        if not data.is_floating_point():
            clean = data.masked_fill(mask[..., None], PADDING)
    found = count_letters("data", check_codes("data", clean), absent)
    here = torch.ones_like(found, dtype=torch.bool) if absent is None else ~absent
    if lengths is not None:
        wrong = here & (_fit("lengths", lengths, data) != found)
        if bool(wrong.any()):
            has = first_entry(found, wrong).rpartition(" ")[2]
            raise ValueError(f"lengths {first_entry(lengths, wrong)}, but the sequence has {has} letters")
    if counts is not None:
        wrong = here & ~(_fit("counts", counts, data) >= 0)  # NaN too
        if bool(wrong.any()):
            raise ValueError(f"counts {first_entry(counts, wrong)}: a count is at least 0")
        here = here & (counts > 0) if drop_uncounted else here
    places = here.reshape(-1).nonzero().squeeze(1)
    return SequenceBags(
        clean.reshape(here.numel(), data.shape[2])[places],
        found.reshape(-1)[places],
        None if counts is None else counts.reshape(-1)[places],
        places,
        here.sum(1),
        data.shape[1],
    )


def _fit(name: str, part: object, data: Tensor) -> Tensor:
    if not isinstance(part, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(part).__name__}")
    if part.shape != data.shape[:2]:
        raise ValueError(
            f"{name} must have shape (B, N) = {tuple(data.shape[:2])}, one entry a sequence; got {tuple(part.shape)}"
        )
    return part


def top_rows(bags: SequenceBags, scores: Tensor, fraction: float, least: int = 1) -> Tensor:
    """The rows of the highest scores of each bag, ascending: ceil(fraction * n) of n, but at least `least`.

    scores: (M,). Never more than the bag has; ties by lowest row; NaN counts as highest.
    """
    # Without the rounding of, say, 0.1 * 30 in binary numbers, which ends above 3.
    wanted = torch.ceil(fraction * bags.sizes.double() - 1e-9).long().clamp_min(least)
    ranked = bags.padded(scores, -math.inf).argsort(dim=1, descending=True, stable=True)
    # Rank of each: fewer than `wanted` are before it. Padding ranks after all sequences, being the last of its ties.
    order = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    )
    kept = order < torch.minimum(wanted, bags.sizes)[:, None]
    slots, _ = bags.slots()
    flat = kept.reshape(-1)
    return (flat if slots is None else flat[slots]).nonzero().squeeze(1)
