"""Embedding of amino-acid sequences: a 1-D convolution over letters and positions, and its maximum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional

from hopdeq_lwpf.data.repertoires import AMINO_ACIDS, PADDING
from hopdeq_lwpf.solvers.base import check_count

LETTERS = len(AMINO_ACIDS)
OUTSIDE = LETTERS  # the code of a place before the first or after the last letter, whose one-hot is zero
POSITIONS = 3  # features of a position: start, end, centre
# Mean square length of the input of one tap: a one-hot has 1, the three ramps of a long sequence together 2/3.
TAP_SQUARES = 1 + 2 / 3
# Mean of the largest of 14 independent N(0, 1): one a position of a sequence of usual length.
EXPECTED_MAXIMUM = 1.7
BLOCK = 8192  # windows whose sums are made at once


class SequenceEmbedding(nn.Module):
    """Codes of amino acids (*batch, L) -> embeddings (*batch, kernels): max over positions of SELU(convolution).

    The network h of DeepRC (Widrich et al. 2020, NeurIPS). A letter is a one-hot of 20 and `position_features`;
    the windows of the convolution are centred at the letters of the sequence and see zeros beyond its ends, so
    that nothing depends on padding, and sequences may be shorter than the kernel. DeepRC divides the input by
    the standard deviation of the padded bag; here weights start as N(0, 1 / (kernel_size (1 + 2/3))) instead,
    5/3 being about the square length of a letter with its position, so that activations start at unit variance
    whatever the bag. Biases start at -1.7, about minus the maximum of so many activations: embeddings would
    otherwise have a large mean, common to all sequences, and so would the scores of attention (in
    `RepertoireClassifier` 34 instead of 7 of 200 seeds start with all scores of 4 repertoires at 0 or below).

    kernels: 32, kernel_size: 9, as in DeepRC. The convolution of one-hots is a sum of rows of a table, one row a
    pair of letters, and its gradient reaches only the winning positions. With one thread of a shared machine,
    forward and backward take 2.0 ms for 400 sequences of 10 to 20 letters and 13 ms for 4,000; torch's conv1d of
    one-hots and its maximum 5.7 and 43 ms.
    """

    def __init__(self, kernels: int = 32, kernel_size: int = 9) -> None:
        super().__init__()
        check_count("kernels", kernels, 1)
        check_count("kernel_size", kernel_size, 1)
        self.weight = nn.Parameter(torch.empty(kernels, LETTERS + POSITIONS, kernel_size))
        self.bias = nn.Parameter(torch.empty(kernels))
        self.reset_parameters()

    @property
    def kernels(self) -> int:
        """The width of an embedding."""
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> int:
        """How many letters a window has."""
        return self.weight.shape[2]

    def reset_parameters(self) -> None:
        """New weights; biases -1.7."""
        nn.init.normal_(self.weight, 0.0, 1 / math.sqrt(self.kernel_size * TAP_SQUARES))
        nn.init.constant_(self.bias, -EXPECTED_MAXIMUM)

    def forward(self, codes: Tensor) -> Tensor:
        """codes: (*batch, L), any integer dtype: 0 ... 19, places in `AMINO_ACIDS`, then -1 as padding.

        Raises TypeError for other dtypes; ValueError for other codes, a letter after padding, or a sequence
        without letters, naming the place.
        """
        lengths = count_letters("codes", check_codes("codes", codes))
        flat = codes.reshape(lengths.numel(), codes.shape[-1])
        return self.embed(flat, lengths.reshape(-1)).reshape(*lengths.shape, self.kernels)

    def embed(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """The same for codes (M, L) that were checked and their lengths (M,): (M, kernels)."""
        if not codes.shape[0]:
            return self.weight.new_zeros((0, self.kernels)) + 0 * self.bias  # with a gradient, as for others
        codes = codes[:, : int(lengths.max())]
        known, which = lengths.unique(return_inverse=True)
        # SELU grows, so that it may be applied to the maximum alone.
        return functional.selu(best_rows(self._table(known, codes.shape[1]), self._rows(codes, which)))

    def _table(self, lengths: Tensor, longest: int) -> Tensor:
        """What each pair of taps, the odd tap and each position of each length add: (rows, kernels)."""
        size, weight = self.kernel_size, self.weight
        taps = functional.pad(weight[:, :LETTERS].permute(2, 1, 0), (0, 0, 0, 1))  # (size, 21, kernels)
        first, second = taps[: size - size % 2 : 2], taps[1::2]
        parts = [(first[:, :, None] + second[:, None]).reshape(-1, self.kernels)]
        if size % 2:
            parts.append(taps[-1])
        features = position_features(lengths, longest, weight.dtype).transpose(1, 2)
        features = functional.pad(features, (size // 2, size - 1 - size // 2))
        placed = functional.conv1d(features, weight[:, LETTERS:], self.bias).transpose(1, 2)
        # A window beyond the last letter never has the largest sum.
        beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
        placed = placed.masked_fill(beyond[..., None], -math.inf)
        return torch.cat([*parts, placed.reshape(-1, self.kernels)])

    def _rows(self, codes: Tensor, which: Tensor) -> Tensor:
        """The rows of the table that make up each window: (M, L, taps / 2 rounded up + 1)."""
        size, longest = self.kernel_size, codes.shape[1]
        codes = codes.to(torch.int32)
        codes = functional.pad(codes, (size // 2, size - 1 - size // 2), value=PADDING)
        codes = torch.where(codes == PADDING, OUTSIDE, codes)
        alphabet = LETTERS + 1
        pairs = codes[:, :-1] * alphabet + codes[:, 1:]
        count = size // 2
        rows = codes.new_empty((codes.shape[0], longest, count + size % 2 + 1))
        for pair in range(count):
            start = 2 * pair
            torch.add(pairs[:, start : start + longest], pair * alphabet**2, out=rows[..., pair])
        end = count * alphabet**2
        if size % 2:
            torch.add(codes[:, size - 1 :], end, out=rows[..., count])
            end += alphabet
        at = torch.arange(longest, dtype=torch.int32, device=codes.device) + end
        torch.add((which.to(torch.int32) * longest)[:, None], at, out=rows[..., -1])
        return rows

    def extra_repr(self) -> str:
        return f"kernels={self.kernels}, kernel_size={self.kernel_size}"


def position_features(lengths: Tensor, longest: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(*batch,) lengths -> (*batch, longest, 3): how near each letter is to start, end and centre; 0 outside.

    With p = 2 i / (n - 1) - 1 from -1 at the first of n letters to 1 at the last (0 where n = 1): start
    max(-p, 0), end max(p, 0), centre 1 - |p|; they sum to 1.
    """
    place = torch.arange(longest, dtype=torch.float64, device=lengths.device)
    count = lengths[..., None]
    p = torch.where(count > 1, 2 * place / (count - 1).clamp_min(1) - 1, 0.0)
    ramps = torch.stack([(-p).clamp_min(0), p.clamp_min(0), 1 - p.abs()], -1)
    return ramps.masked_fill((place >= count)[..., None], 0.0).to(dtype)


def best_rows(table: Tensor, rows: Tensor) -> Tensor:
    """max over l of sum over t of table[rows[m, l, t]]: (M, C); of a tie the last l gets the gradient.

    table: (R, C). rows: (M, L, T) int32.
    """
    best: Tensor = _BestRows.apply(table, rows)[0]
    return best


class _BestRows(Function):
    """`best_rows` and the winning positions.

    The gradient goes to the rows of the winning positions alone, L times fewer than those that were read.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        longest, taps = rows.shape[1:]
        small = torch.uint8 if longest <= torch.iinfo(torch.uint8).max else torch.int32
        place = torch.arange(longest, device=rows.device).to(small)[:, None]
        values, places = [], []
        # A block at a time, which stays in the cache.
        for block in rows.split(max(1, BLOCK // longest)):
            sums = functional.embedding_bag(block.reshape(-1, taps), table, mode="sum")
            sums = sums.view(len(block), longest, -1)
            best = sums.amax(1)
            values.append(best)
            # Many times faster than the indices of max().
            places.append(((sums == best[:, None]).to(small) * place).amax(1))
        return torch.cat(values), torch.cat(places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        table, rows = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(rows, output[1])
        ctx.shape = table.shape

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, at = ctx.saved_tensors
        at, grad = at.long(), grads[0]
        size, width = ctx.shape
        taps = rows.shape[2]
        column = torch.arange(width, device=rows.device)
        chosen = [rows[..., tap].gather(1, at).long() * width + column for tap in range(taps)]
        spread = grad.reshape(-1).repeat(taps)
        flat = torch.stack(chosen).reshape(-1)
        return grad.new_zeros(size * width).index_add(0, flat, spread).view(size, width), None


def check_codes(name: str, codes: object) -> Tensor:
    """Integer codes of letters (*batch, L), or an error: of another kind, or the first that is no letter."""
    if not isinstance(codes, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(codes).__name__}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(
            f"{name} must hold the codes of letters as integers, as collate_repertoires makes them, got {codes.dtype}"
        )
    if not codes.ndim:
        raise ValueError(f"{name} must have shape (*batch, L), got a scalar")
    if codes.numel():
        low, high = torch.aminmax(codes)
        if int(low) < PADDING or int(high) >= LETTERS:
            raise ValueError(
                f"{name} {first_entry(codes, (codes < PADDING) | (codes >= LETTERS))}: codes are 0 ... "
                f"{LETTERS - 1}, the places in {AMINO_ACIDS}, and {PADDING} for padding; data.encode_sequences "
                "makes them"
            )
    return codes


def count_letters(name: str, codes: Tensor, absent: Tensor | None = None) -> Tensor:
    """The lengths of sequences, (*batch, L) -> (*batch,) int64; ValueError where a letter follows padding.

    Also where a sequence has no letters, unless it is absent, (*batch,) bool.
    """
    lengths = (codes != PADDING).sum(-1)
    empty = lengths == 0 if absent is None else (lengths == 0) & ~absent
    if bool(empty.any()):
        place = tuple(empty.nonzero()[0].tolist())
        raise ValueError(f"{name}: the sequence at {place} has no letters; mask it or leave it out")
    late = (codes != PADDING) & (torch.arange(codes.shape[-1], device=codes.device) >= lengths[..., None])
    if bool(late.any()):
        raise ValueError(f"{name} {first_entry(codes, late)}, after padding: padding comes after all letters")
    return lengths


def first_entry(values: Tensor, wrong: Tensor) -> str:
    """Place and value of the first entry that is wrong."""
    place = tuple(wrong.nonzero()[0].tolist())
    return f"at {place} is {values[place].item()!r}"
