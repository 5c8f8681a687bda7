"""Order statistics of streamed scores: against torch's and sorted lists, with ties, signs, NaN and masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, normal
from references import best, exactly, lower_median
from torch.testing import assert_close

from hopdeq_lwpf.streaming import BlockPatterns, TensorPatterns
from hopdeq_lwpf.streaming.attention import Scores, Stored
from hopdeq_lwpf.streaming.selection import first_equal, largest, median

TINY = {torch.float32: 1e-42, torch.float64: 5e-324}  # both subnormal


def one(dtype):
    """A state 1 with patterns of width 1, so that scores are any numbers we like."""
    return Scores(torch.ones(1, 1, dtype=dtype), 1.0)


def stored(row, dtype, mask=None, block=None):
    patterns = torch.tensor(row, dtype=dtype)[:, None]
    return Stored(patterns, None, None if mask is None else torch.tensor(mask), block=block)


@st.composite
def rows(draw):
    """A row of numbers with ties, both zeros, subnormals, large ones and infinities; dtype, mask, size of a block."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    width = 32 if dtype == torch.float32 else 64
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, TINY[dtype], -TINY[dtype]])
    number = few | st.floats(allow_nan=False, width=width)
    row = draw(st.lists(number, min_size=1, max_size=20))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=len(row), max_size=len(row)))
    return row, dtype, mask, draw(st.integers(1, len(row) + 1))


# --- median


@settings(max_examples=150)
@given(drawn=rows())
def test_the_median_is_exactly_that_of_a_sorted_list(drawn):
    row, dtype, mask, block = drawn
    seen = [s for s, out in zip(row, mask or [False] * len(row), strict=True) if not out]
    expected = torch.tensor([[lower_median(seen) if seen else 0.0]], dtype=dtype)
    exactly(median(one(dtype), stored(row, dtype, mask, block)), expected)
    if seen:
        exactly(expected[0, 0], torch.tensor(seen, dtype=dtype).median())


@settings(max_examples=40)
@given(data=st.data())
def test_medians_of_many_rows_and_of_all_together(data):
    b, n, block = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 30)), data.draw(st.integers(1, 31))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    # Few distinct numbers make many ties.
    scale = data.draw(st.sampled_from([1.0, 1e-30, 1e30]))
    z, patterns = (normal(b, 2) * scale).round(decimals=1).to(dtype), normal(n, 2, seed=2).round().to(dtype)
    which = data.draw(st.sampled_from([None, (n,), (b, n)]))
    mask = None if which is None else torch.rand(which, generator=torch.Generator().manual_seed(4)) < 0.5
    scores = Scores(z, 1.0)
    given_ = Stored(patterns, None, mask, block=block)
    full = scores(patterns) if mask is None else scores(patterns).masked_fill(mask, math.nan)
    # Products of two numbers may round otherwise in blocks of another length.
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps * scale}
    expected = full.nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
    assert_close(median(scores, given_), expected, **close)
    assert_close(median(scores, given_, whole=True), full.nanmedian().nan_to_num(0.0), **close)


@pytest.mark.parametrize("whole", [False, True])
def test_a_median_of_a_row_with_nan_is_nan(whole):
    z = torch.tensor([[1.0], [math.nan], [2.0]])
    found = median(Scores(z, 1.0), Stored(normal(9, 1).float(), None, None, block=2), whole=whole)
    assert found.isnan().tolist() == (True if whole else [[False], [True], [False]])


def test_no_row_has_no_median():
    empty = Scores(torch.ones(0, 1), 1.0)
    exactly(median(empty, stored([1.0], torch.float32)), torch.ones(0, 1))
    exactly(median(empty, stored([1.0], torch.float32), whole=True), torch.tensor(0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_in_the_last_bit_are_told_apart(dtype):
    up, down = (torch.tensor(to, dtype=dtype) for to in (math.inf, -math.inf))
    for middle in (1.0, -1.0, 3.0e-39, -(2.0**60)):
        center = torch.tensor(middle, dtype=dtype)
        row = [float(torch.nextafter(center, side)) for side in (up, down)] + [middle]
        exactly(median(one(dtype), stored(row, dtype)), center.reshape(1, 1))


def test_sources_have_the_median_of_tensors():
    scores, patterns = Scores(normal(4, 3), 2.0), normal(50, 3, seed=2)
    expected = median(scores, Stored(patterns, None, None))
    assert_close(expected, scores(patterns).median(-1, keepdim=True).values)
    for source in (TensorPatterns(patterns, 7), BlockPatterns(list(patterns.split(9)), 4)):
        assert_close(median(scores, Stored(source, None, None)), expected)


# --- largest


@settings(max_examples=150)
@given(drawn=rows(), k=st.integers(1, 24))
def test_the_largest_are_those_of_a_sorted_list_ties_by_lowest_number(drawn, k):
    row, dtype, mask, block = drawn
    row = [torch.tensor(s, dtype=dtype).item() for s in row]
    # -inf is what a score without pattern is: it has no number.
    out = [hidden or s == -math.inf for s, hidden in zip(row, mask or [False] * len(row), strict=True)]
    chosen = sorted(best(row, out, k), key=lambda i: (-row[i], i))
    top, index = largest(one(dtype), stored(row, dtype, mask, block), k)
    assert index.tolist() == [chosen + [-1] * (k - len(chosen))]
    assert top.tolist() == [[row[i] for i in chosen] + [-math.inf] * (k - len(chosen))]


def test_the_largest_of_many_rows_with_masks_of_their_own():
    scores, patterns = Scores(normal(6, 3).round(), 1.0), normal(40, 3, seed=2).round()
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[2] = True
    mask[3, :-2] = True
    for block in (1, 7, 40):
        top, index = largest(scores, Stored(patterns, None, mask, block=block), 5)
        for row, full in enumerate(scores(patterns).tolist()):
            chosen = sorted(best(full, mask[row].tolist(), 5), key=lambda i: (-full[i], i))
            assert index[row].tolist() == chosen + [-1] * (5 - len(chosen))
            assert [full[i] for i in chosen] == top[row, : len(chosen)].tolist()


def test_numbers_begin_where_the_patterns_of_this_process_do():
    row = [1.0, 3.0, 3.0, 2.0]
    part = stored(row, F64, block=2)._replace(start=100)
    exactly(largest(one(F64), part, 3)[1], torch.tensor([[101, 102, 103]]))
    exactly(first_equal(one(F64), part, torch.tensor([[3.0]], dtype=F64)), torch.tensor([101]))


def test_a_row_with_nan_has_no_largest_and_harms_no_other():
    z = torch.tensor([[1.0], [math.nan], [-1.0]], dtype=F64)
    patterns = torch.tensor([[1.0], [2.0], [2.0], [0.0]], dtype=F64)
    for block in (1, 2, 4):
        top, index = largest(Scores(z, 1.0), Stored(patterns, None, None, block=block), 2)
        assert bool(top[1].isnan().all())
        assert index[[0, 2]].tolist() == [[1, 2], [3, 0]]
    # One pattern that is no number spoils every row, whether it comes first or last.
    for place in (0, 3):
        bad = patterns.index_fill(0, torch.tensor(place), math.nan)
        assert bool(largest(Scores(z, 1.0), Stored(bad, None, None, block=1), 2)[0].isnan().all())


# --- first_equal


@settings(max_examples=60)
@given(drawn=rows())
def test_the_first_equal_score_is_that_of_a_list(drawn):
    row, dtype, mask, block = drawn
    row = [torch.tensor(s, dtype=dtype).item() for s in row]
    hidden = mask or [False] * len(row)
    for value in (*set(row), 0.123, math.nan):
        places = [i for i, s in enumerate(row) if s == value and not hidden[i]]
        found = first_equal(one(dtype), stored(row, dtype, mask, block), torch.tensor([[value]], dtype=dtype))
        assert found.tolist() == [places[0] if places else -1]
