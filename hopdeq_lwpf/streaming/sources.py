"""Where stored patterns come from, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hopdeq_lwpf._types import check_float_tensor

# Scores of one block, in bytes: so that what is computed from them stays in the cache. Of 256 queries of 64 numbers,
# blocks of 1 to 4 MiB took the same time within a tenth, those of 32 MiB more than half as long again.
BLOCK_BYTES = 2 * 2**20
# Fewer patterns make a product too thin for the processor, more rows than this would be a copy of the file.
SMALLEST_BLOCK, LARGEST_BLOCK = 512, 32768


def block_size(queries: int, itemsize: int) -> int:
    """How many patterns are looked at together by so many queries."""
    fits = BLOCK_BYTES // (max(queries, 1) * itemsize)
    return max(SMALLEST_BLOCK, min(LARGEST_BLOCK, fits))


class PatternSource:
    """Stored patterns (N, d) that are read in blocks, as often as a solve asks for them.

    Hand one to `retrieve` in place of a tensor. Each block is converted to dtype and device of the queries. A new
    source overrides `blocks` and `rows`, and sets `count`, `width` and `dtype`.

    block: patterns a block; None: as many as keep its scores in the cache (`block_size`).
    """

    count: int
    width: int
    dtype: torch.dtype
    block: int | None = None

    @property
    def shape(self) -> torch.Size:
        """(N, d)."""
        return torch.Size((self.count, self.width))

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    def blocks(self, size: int) -> Iterator[Tensor]:
        """The patterns in order, at most `size` at a time, (n, d)."""
        raise NotImplementedError(f"{type(self).__name__} must override blocks(size)")

    def rows(self, index: Tensor) -> Tensor:
        """The patterns of these numbers: int64 (k,) -> (k, d)."""
        raise NotImplementedError(f"{type(self).__name__} must override rows(index)")

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.count} patterns of width {self.width}, {self.dtype})"


class TensorPatterns(PatternSource):
    """A tensor (N, d) as blocks: what a memory-mapped file is, and how to stream what is in memory already."""

    def __init__(self, tensor: Tensor, block: int | None = None) -> None:
        check_float_tensor("patterns", tensor)
        _check_matrix(tuple(tensor.shape))
        self.tensor, self.block = tensor, _checked_block(block)
        self.count, self.width = tensor.shape
        self.dtype = tensor.dtype

    def blocks(self, size: int) -> Iterator[Tensor]:
        """Slices of the tensor."""
        return iter(self.tensor.split(size))

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the tensor."""
        return self.tensor.index_select(0, index.to(self.tensor.device))


class BlockPatterns(PatternSource):
    """Patterns that a function or a sequence gives, one tensor (n, d) after the other.

    given: a sequence of tensors, or a function without arguments that returns an iterator of them; it is called for
        every pass over the patterns and must give the same each time. An iterator is refused: it could be read once.
        So is a block that requires grad, since blocks pass no gradient on.

    Making one reads all blocks once, to count them and to check that they fit together. Raises TypeError or
    ValueError, naming the block, for what does not.
    """

    def __init__(
        self, given: Iterable[Tensor] | Callable[[], Iterable[Tensor]], block: int | None = None
    ) -> None:
        if isinstance(given, Iterator):
            raise TypeError(
                f"patterns as an iterator ({type(given).__name__}) can be read only once, and a solve reads them at "
                "every step; give a list of blocks, or a function that returns a new iterator"
            )
        self._given, self.block = given, _checked_block(block)
        self.count, first = 0, None
        for number, part in enumerate(self._parts()):
            check_float_tensor(f"block {number} of patterns", part)
            if part.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"block {number} of patterns requires grad, and blocks pass no gradient on; detach() it, or give "
                    "one tensor with stream=True, which gets its gradient"
                )
            if part.ndim != 2:
                raise ValueError(f"block {number} of patterns must be (n, d), got shape {tuple(part.shape)}")
            first = part if first is None else first
            if part.shape[1] != first.shape[1] or part.dtype != first.dtype:
                raise ValueError(
                    f"block {number} of patterns is {tuple(part.shape)} {part.dtype}, the first one is "
                    f"{tuple(first.shape)} {first.dtype}: all need one width and dtype"
                )
            self.count += len(part)
        _check_matrix((self.count, 0 if first is None else first.shape[1]))
        assert first is not None
        self.width, self.dtype = first.shape[1], first.dtype

    def _parts(self) -> Iterable[Tensor]:
        return self._given() if callable(self._given) else self._given

    def blocks(self, size: int) -> Iterator[Tensor]:
        """The blocks as they come, split where they are larger; ValueError where they are fewer or more than before."""
        seen, same = 0, True
        for part in self._parts():
            seen += len(part)
            same = seen <= self.count and part.shape[1:] == (self.width,)
            if not same:
                break
            if len(part):
                yield from part.split(size)
        if not same or seen != self.count:
            raise ValueError(
                f"the blocks of patterns changed between two passes: there were {self.count} patterns of width "
                f"{self.width}, and now there are other ones; give the same blocks each time"
            )

    def rows(self, index: Tensor) -> Tensor:
        """One pass over the blocks; raises as `blocks` does."""
        found = torch.empty((len(index), self.width), dtype=self.dtype)
        start, index = 0, index.cpu()
        for part in self.blocks(LARGEST_BLOCK):
            here = ((index >= start) & (index < start + len(part))).nonzero().squeeze(1)
            found[here] = part.detach().cpu().index_select(0, index[here] - start)
            start += len(part)
        return found


def as_source(patterns: Any) -> PatternSource | None:
    """A source for patterns that are no tensor: a source itself, blocks in a list, or a function; None for a tensor."""
    if isinstance(patterns, Tensor):
        return None
    if isinstance(patterns, PatternSource):
        return patterns
    if isinstance(patterns, (str, bytes)) or hasattr(patterns, "__fspath__"):
        raise TypeError(
            f"patterns is the name of a file, {patterns!r}; give open_patterns({str(patterns)!r})"
        )
    if callable(patterns) or (isinstance(patterns, Iterable) and not hasattr(patterns, "__array__")):
        return BlockPatterns(patterns)
    raise TypeError(
        f"patterns must be a torch.Tensor, got {type(patterns).__name__}; use torch.as_tensor(patterns). Also allowed: "
        "open_patterns(file), a list of tensors, or a function that returns an iterator of them"
    )


def _check_matrix(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"patterns that are streamed must be (N, d) with at least one pattern, got {shape}")


def _checked_block(block: int | None) -> int | None:
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise ValueError(f"block must be None or an integer >= 1, got {block!r}")
    return block
