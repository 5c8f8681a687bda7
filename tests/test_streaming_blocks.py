"""Streamed patterns as a list of blocks or a function that gives them, and what a source is."""

from pathlib import Path

import pytest
import torch
from problems import F64, normal
from references import exactly
from torch.testing import assert_close

from hopdeq_lwpf import retrieve
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.streaming import BlockPatterns, PatternSource, TensorPatterns, as_source
from hopdeq_lwpf.streaming.sources import LARGEST_BLOCK, SMALLEST_BLOCK, block_size

N, D = 23, 4


def recalled(patterns, dtype=F64):
    # A tracked median asks for single rows, too.
    return retrieve(normal(5, D, seed=2).to(dtype), patterns, forgetting=PFU(tracked=True), steps=2).value


def gives(patterns, size):
    """A function that gives blocks, as a generator."""

    def blocks():
        yield from patterns.split(size)

    return blocks


@pytest.mark.parametrize("size", [1, 7, 30])
def test_blocks_of_a_list_a_tuple_and_a_function_are_the_whole(size):
    patterns = normal(N, D)
    parts = patterns.split(size)
    expected = recalled(patterns)
    for given in (list(parts), tuple(parts), gives(patterns, size)):
        source = BlockPatterns(given, block=3)
        assert source.shape == (N, D)
        assert source.dtype == F64
        exactly(torch.cat(list(source.blocks(3))), patterns)
        assert max(len(part) for part in source.blocks(3)) <= 3
        exactly(source.rows(torch.tensor([22, 0, 5])), patterns[[22, 0, 5]])
        assert_close(recalled(source), expected, rtol=0, atol=1e-13)
        assert_close(recalled(given), expected, rtol=0, atol=1e-13)


def test_blocks_without_a_pattern_are_passed_over():
    patterns = normal(N, D)
    parts = [patterns[:0], patterns[:9], patterns[9:9], patterns[9:], patterns[:0]]
    assert_close(recalled(parts), recalled(patterns), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (gives(normal(N, D), 7)(), TypeError, "iterator .generator. can be read only once"),
        (iter([normal(N, D)]), TypeError, "can be read only once"),
        ([], ValueError, "at least one pattern"),
        ([normal(0, D)], ValueError, "at least one pattern"),
        ([normal(2, D), normal(2, D + 1)], ValueError, r"block 1 of patterns is \(2, 5\)"),
        ([normal(2, D), normal(2, D).float()], ValueError, "block 1 of patterns is .* torch.float32"),
        ([normal(2, D), normal(D)], ValueError, r"block 1 of patterns must be \(n, d\)"),
        ([normal(2, D), torch.ones(2, D, dtype=torch.int64)], TypeError, "block 1 of patterns"),
        ([normal(2, D), [[1.0] * D]], TypeError, "block 1 of patterns"),
        ([normal(2, D), normal(2, D).requires_grad_()], ValueError, "block 1 of patterns requires grad"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(given, kind, message):
    with pytest.raises(kind, match=message):
        BlockPatterns(given)


def test_blocks_that_require_grad_are_welcome_where_none_is_recorded():
    with torch.no_grad():
        assert len(BlockPatterns([normal(2, D).requires_grad_()])) == 2


@pytest.mark.parametrize(
    "later",
    [
        [normal(N, D)[:-1]],
        [normal(N, D), normal(1, D)],
        [normal(N - 1, D), normal(1, D + 1)],
        [normal(N, D + 1)],
        [],
    ],
)
def test_blocks_that_changed_between_two_passes_are_noticed(later):
    passes = [[normal(N, D)], later, later]
    source = BlockPatterns(lambda: passes.pop(0))
    with pytest.raises(ValueError, match="changed between two passes"):
        list(source.blocks(7))
    with pytest.raises(ValueError, match="changed between two passes"):
        source.rows(torch.tensor([0]))


def test_a_function_that_returns_its_only_iterator_is_noticed():
    only = iter([normal(N, D)])
    source = BlockPatterns(lambda: only)
    with pytest.raises(ValueError, match="changed between two passes"):
        recalled(source)


# --- what is a source


def test_what_becomes_a_source():
    patterns = normal(N, D)
    assert as_source(patterns) is None
    for source in (TensorPatterns(patterns), BlockPatterns([patterns])):
        assert as_source(source) is source
    assert isinstance(as_source([patterns]), BlockPatterns)
    for name in ("patterns.npy", Path("patterns.npy")):
        with pytest.raises(TypeError, match=r"give open_patterns\('patterns.npy'\)"):
            retrieve(normal(2, D), name)
    for other in (3, None, patterns.numpy()):
        with pytest.raises(TypeError, match="patterns must be a torch.Tensor, got"):
            retrieve(normal(2, D), other)


def test_a_tensor_that_cannot_be_patterns_is_refused():
    for shape in ((4,), (2, 3, 4), (0, 4), (4, 0)):
        with pytest.raises(ValueError, match=r"must be \(N, d\) with at least one pattern"):
            TensorPatterns(torch.ones(shape))
    with pytest.raises(TypeError):
        TensorPatterns(torch.ones(2, 2, dtype=torch.int64))


def test_a_source_of_ones_own_overrides_two_methods():
    class Squares(PatternSource):
        """Patterns that are computed when they are asked for."""

        count, width, dtype = N, D, F64

        def blocks(self, size):
            for start in range(0, self.count, size):
                yield self.rows(torch.arange(start, min(start + size, self.count)))

        def rows(self, index):
            return (index[:, None].double() * torch.arange(1, D + 1)).sin()

    whole = (torch.arange(N)[:, None].double() * torch.arange(1, D + 1)).sin()
    assert_close(recalled(Squares()), recalled(whole), rtol=0, atol=1e-13)
    assert repr(Squares()) == "Squares(23 patterns of width 4, torch.float64)"
    with pytest.raises(NotImplementedError, match="must override blocks"):
        PatternSource().blocks(3)
    with pytest.raises(NotImplementedError, match="must override rows"):
        PatternSource().rows(torch.zeros(1))


def test_a_block_holds_as_many_patterns_as_the_cache_allows():
    assert block_size(1, 4) == LARGEST_BLOCK
    assert block_size(0, 4) == LARGEST_BLOCK
    assert block_size(10**6, 8) == SMALLEST_BLOCK
    assert block_size(256, 4) * 256 * 4 == 2 * 2**20
