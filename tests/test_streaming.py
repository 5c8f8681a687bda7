"""Streamed retrieval: against the dense path, blocks, dtypes, NaN, and what cannot be streamed."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import F64, normal
from references import exactly
from streamed import CLOSE, MAKE, TIGHT, B, D, N, masks, one_mask
from torch.testing import assert_close

from hopdeq_lwpf import Memory, Result, Termination, fixed_point, retrieve
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import Retrieval
from hopdeq_lwpf.solvers import Implicit
from hopdeq_lwpf.streaming import TensorPatterns

# (separation, similarity, inject, normalize, steps, mask, values): every value of every dial, not every combination.
SETTINGS = [
    ("softmax", "dot", "start", None, 1, None, False),
    ("softmax", "dot", "input", None, 3, masks, True),
    ("softmax1", "dot", "start", "sphere", 3, one_mask, True),
    ("softmax1", "dot", "input", "layernorm", 1, masks, False),
    ("softmax", "euclidean", "start", None, 3, masks, True),
    ("softmax1", "euclidean", "input", None, 1, one_mask, False),
    ("softmax", "dot", "input", None, None, one_mask, True),
    ("softmax1", "euclidean", "input", None, None, masks, True),
]


def both(settings_, unit, beta_rows, blocks, dtype=F64):
    """Recall and gradients: of the dense path, and of the streamed one for each size of a block."""
    separation, similarity, inject, normalize, steps, mask, with_values = settings_
    found = []
    for block in (None, *blocks):
        patterns, query = normal(N, D).to(dtype), normal(B, D, seed=2).to(dtype)
        values = normal(N, 3, seed=3).to(dtype) if with_values else None
        beta = torch.linspace(0.5, 2.0, B, dtype=dtype) if beta_rows else torch.tensor(1.7, dtype=dtype)
        leaves = [patterns, beta] + ([query] if inject == "input" or steps else []) + [values] * with_values
        for leaf in leaves:
            leaf.requires_grad_()
        given_ = patterns if block is None else TensorPatterns(patterns, block)
        recall = retrieve(
            query, given_, beta=beta, separation=separation, similarity=similarity, inject=inject,
            normalize=normalize, forgetting=MAKE[unit](), steps=steps, mask=mask and mask(), values=values,
            stop=TIGHT, solver="picard", adjoint=Implicit(rtol=1e-12),
        )  # fmt: skip
        # The state of an equilibrium has no gradient of its own where there are values.
        loss = (recall.value * normal(*recall.value.shape, seed=4).to(dtype)).sum()
        loss = loss + (recall.state * normal(B, D, seed=5).to(dtype)).sum()
        found.append((recall, torch.autograd.grad(loss, leaves, allow_unused=True)))
    return found


def same(dense, streamed, rows=None, **close):
    for name in ("value", "state", "weight", "residual", "energy"):
        a, b = getattr(dense, name), getattr(streamed, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_close(b if rows is None else b[rows], a if rows is None else a[rows], **close)
    for name in ("index", "support", "result", "steps"):
        a, b = getattr(dense, name), getattr(streamed, name)
        exactly(b if rows is None else b[rows], a if rows is None else a[rows])


# --- against the dense path


@pytest.mark.parametrize("unit", MAKE)
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_streamed_is_dense_with_all_gradients(unit, number):
    (dense, expected), *others = both(
        SETTINGS[number], unit, beta_rows=number % 2, blocks=(1 + 5 * number, N)
    )
    # A map without an energy may cycle, and then only the lowest residual of one of thousands of steps is kept.
    rows = dense.converged if SETTINGS[number][4] is None else torch.ones(B, dtype=torch.bool)
    assert rows.sum() >= B - 3
    assert (expected[0] != 0).any() or (unit == "relu" and SETTINGS[number][1] == "euclidean")
    for streamed, got in others:
        same(dense, streamed, rows, **CLOSE)
        if rows.all():
            for a, b in zip(expected, got, strict=True):
                # None and 0 are one thing to whoever asks for a gradient that is not there.
                zeros = (
                    torch.zeros(()) if a is None and b is None else torch.zeros_like(b if a is None else a)
                )
                assert_close(zeros if b is None else b, zeros if a is None else a, **CLOSE)


@pytest.mark.parametrize("unit", ["none", "relu", "pfu", "topk", "tracked", "tensor", "relu min_keep"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_streamed_is_dense_in_float32(unit, number):
    (dense, expected), (streamed, got) = both(SETTINGS[number], unit, False, (13,), torch.float32)
    # 97 terms in float32 make errors of 1e-7 x 97 ** .5 in each of three steps.
    assert_close(streamed.value, dense.value, rtol=1e-5, atol=3e-6)
    for a, b in zip(expected, got, strict=True):
        assert_close(b, a, rtol=1e-4, atol=1e-5 * (1 + float(a.abs().max())))


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_any_block(data):
    n, d = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 5))
    batch = data.draw(st.sampled_from([(), (0,), (1,), (4,), (2, 3), (2, 0), (2, 1, 2)]))
    block = data.draw(st.integers(1, n + 1))
    unit = data.draw(st.sampled_from(sorted(MAKE)))
    steps = data.draw(st.sampled_from([1, 2, None]))
    separation = data.draw(st.sampled_from(["softmax", "softmax1"]))
    patterns, query = normal(n, d, seed=data.draw(st.integers(0, 9))), normal(*batch, d, seed=2)
    which = data.draw(st.sampled_from([None, (n,), (*batch, n)]))
    mask = None if which is None else torch.rand(which, generator=torch.Generator().manual_seed(5)) < 0.5
    options = {"beta": 2.0, "separation": separation, "steps": steps, "mask": mask, "stop": TIGHT}
    values = normal(n, 2, seed=4)
    leaf = patterns.clone().requires_grad_()
    dense = retrieve(query, leaf, forgetting=MAKE[unit](), values=values, solver="picard", **options)
    sourced = patterns.clone().requires_grad_()
    source = TensorPatterns(sourced, block)
    streamed = retrieve(query, source, forgetting=MAKE[unit](), values=values, solver="picard", **options)
    assert streamed.value.shape == (*batch, 2)
    assert streamed.state.shape == (*batch, d)
    done = dense.converged if steps is None else torch.ones(batch, dtype=torch.bool)
    same(dense, streamed, done, **CLOSE)
    if done.all():
        dense.value.sum().backward()
        streamed.value.sum().backward()
        assert_close(
            torch.zeros_like(leaf) if sourced.grad is None else sourced.grad,
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad,
            **CLOSE,
        )


def test_stream_true_is_what_a_source_is_and_false_is_dense():
    patterns, query = normal(N, D), normal(B, D, seed=2)
    streamed = retrieve(query, patterns, forgetting="pfu", stream=True)
    same(retrieve(query, TensorPatterns(patterns), forgetting="pfu"), streamed, rtol=0, atol=0)
    with pytest.raises(ValueError, match="stream=False needs patterns as a tensor"):
        retrieve(query, TensorPatterns(patterns), stream=False)
    with pytest.raises(TypeError, match="stream must be None, True or False"):
        retrieve(query, patterns, stream="yes")
    with pytest.raises(ValueError, match="that all queries share"):
        retrieve(query, patterns.expand(B, N, D), stream=True)


@pytest.mark.parametrize("block", [1, 2, 13, 96, 97, 98])
@pytest.mark.parametrize("unit", ["none", "pfu", "topk", "tracked"])
def test_the_size_of_a_block_does_not_matter(block, unit):
    patterns, query = normal(N, D).float(), normal(B, D, seed=2).float()
    whole = retrieve(query, TensorPatterns(patterns), forgetting=MAKE[unit](), steps=2)
    parts = retrieve(query, TensorPatterns(patterns, block), forgetting=MAKE[unit](), steps=2)
    assert_close(parts.value, whole.value, rtol=1e-6, atol=1e-6)  # float32 rounding of 97 terms, twice
    exactly((parts.index, parts.support), (whole.index, whole.support))


def test_twice_the_same_call_gives_the_same_bits():
    results = []
    for _ in range(2):
        patterns = normal(500, D).float().requires_grad_()
        recall = retrieve(normal(B, D).float(), TensorPatterns(patterns, 37), beta=4.0, forgetting="pfu")
        (gradient,) = torch.autograd.grad(recall.value.square().sum(), patterns)
        results.append((recall.value.detach(), recall.residual, recall.steps, gradient))
    exactly(results[0], results[1])


def test_a_batch_is_its_queries_one_by_one():
    patterns, query = TensorPatterns(normal(N, D), 13), normal(B, D, seed=2)
    for unit in ("none", "pfu", "topk", "tracked"):
        together = retrieve(query, patterns, beta=3.0, forgetting=MAKE[unit](), stop=TIGHT, solver="picard")
        for row in range(B):
            alone = retrieve(
                query[row], patterns, beta=3.0, forgetting=MAKE[unit](), stop=TIGHT, solver="picard"
            )
            assert_close(together.value[row], alone.value, **CLOSE)
            exactly(together.index[row], alone.index)


def test_weights_and_diagnostics_of_f_are_those_of_the_dense_one():
    patterns, query = normal(N, D), normal(2, 3, D, seed=2)
    for unit, similarity in itertools.product(("none", "pfu", "topk"), ("dot", "euclidean")):
        f = Retrieval(1.5, forgetting=MAKE[unit](), similarity=similarity, inject="input")
        dense, streamed = f.prepare(query, patterns), f.prepare(query, TensorPatterns(patterns, 13))
        for name in ("weights", "energy", "forward"):
            assert_close(getattr(f, name)(query, streamed), getattr(f, name)(query, dense), **CLOSE)
        for a, b in zip(f.evaluate(query, dense), f.evaluate(query, streamed), strict=True):
            a, b = (part() if callable(part) else part for part in (a, b))
            assert (a is None) == (b is None)
            assert a is None or bool(((a - b).abs() < 1e-9).all())


# --- dtypes, NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", ["none", "relu", "pfu", "topk"])
def test_patterns_and_queries_in_half_precision_are_near_float64(dtype, unit):
    patterns, query = normal(N, D).to(dtype), normal(B, D, seed=2).to(dtype)
    exact = retrieve(query.double(), patterns.double(), beta=2.0, forgetting=MAKE[unit](), steps=1)
    # Half patterns with half queries, and half patterns of a file with queries in float32: sums are in float32, so
    # that what is left is the rounding of the result, half a unit in the last place, and of sums in float32.
    for asked in (query, query.float()):
        recall = retrieve(asked, TensorPatterns(patterns, 13), beta=2.0, forgetting=MAKE[unit](), steps=1)
        assert recall.value.dtype == asked.dtype
        eps = torch.finfo(asked.dtype).eps
        assert_close(recall.value.double(), exact.value, rtol=eps, atol=max(eps / 8, 1e-6))
        exactly((recall.index, recall.support), (exact.index, exact.support))
    solved = retrieve(query, TensorPatterns(patterns, 13), beta=2.0, forgetting=MAKE[unit]())
    assert bool(solved.value.isfinite().all())
    assert solved.value.dtype == dtype


def test_autocast_leaves_the_sums_alone():
    patterns, query = normal(N, D).float(), normal(B, D, seed=2).float()
    expected = retrieve(query, TensorPatterns(patterns, 13), beta=4.0, steps=2, forgetting="pfu").value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = retrieve(query, TensorPatterns(patterns, 13), beta=4.0, steps=2, forgetting="pfu").value
    exactly(got, expected)


NOT_WHOLE = [unit for unit in MAKE if "tensor" not in unit]


@pytest.mark.parametrize("unit", NOT_WHOLE)
@pytest.mark.parametrize("steps", [1, None])
def test_a_query_that_is_not_a_number_harms_no_other(unit, steps):
    patterns, query = TensorPatterns(normal(N, D), 13), normal(B, D, seed=2)
    options = {"steps": steps, "stop": Termination(rtol=1e-10, max_steps=60), "solver": "picard"}
    expected = retrieve(query, patterns, forgetting=MAKE[unit](), **options)
    query[2, 1] = math.nan
    got = retrieve(query, patterns, forgetting=MAKE[unit](), **options)
    same(expected, got, torch.arange(B) != 2, **CLOSE)
    assert got.result[2] == Result.NONFINITE
    assert got.index[2] == -1


@pytest.mark.parametrize("unit", MAKE)
def test_masked_patterns_and_values_may_hold_anything(unit):
    patterns, query, values, mask = normal(N, D), normal(B, D, seed=2), normal(N, 3, seed=3), one_mask()
    options = {"mask": mask, "stop": TIGHT, "solver": "picard", "steps": 3}
    expected = retrieve(query, patterns, values=values, forgetting=MAKE[unit](), **options)
    patterns[mask], values[mask] = math.nan, math.inf
    got = retrieve(query, TensorPatterns(patterns, 13), values=values, forgetting=MAKE[unit](), **options)
    same(expected, got, **CLOSE)


@pytest.mark.parametrize("unit", MAKE)
def test_a_pattern_that_is_not_a_number_is_never_passed_over(unit):
    patterns = normal(N, D)
    patterns[40, 1] = math.nan
    for steps in (1, None):
        got = retrieve(
            normal(B, D, seed=2), TensorPatterns(patterns, 13), forgetting=MAKE[unit](), steps=steps
        )
        assert bool((got.result == Result.NONFINITE).all())
        assert bool((got.index == -1).all())


def test_weights_that_round_to_zero_are_not_counted():
    patterns = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    query = torch.tensor([[1.0, 0.0], [0.9, 0.8]], dtype=F64)
    for beta in (1.0, 500.0, 5000.0):
        dense = retrieve(query, patterns, beta=beta, steps=1)
        exactly(retrieve(query, TensorPatterns(patterns, 2), beta=beta, steps=1).support, dense.support)
    assert dense.support.tolist() == [1, 2]


# --- what cannot be streamed


class OwnUnit(PFU):
    """A unit whose rule nobody knows."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separation": "sparsemax"}, "separation .* needs all scores"),
        ({"forgetting": OwnUnit()}, "is not known to work block by block"),
        ({"mask": torch.zeros(N)}, "mask must be a bool tensor"),
        ({"mask": torch.zeros(N - 1, dtype=torch.bool)}, "mask has shape"),
        ({"mask": torch.zeros(2, N, dtype=torch.bool)}, "mask has shape"),
        ({"values": torch.zeros(N - 1, 2)}, "one row a pattern"),
        ({"values": torch.zeros(N)}, "one row a pattern"),
        ({"values": torch.zeros(N, 2, dtype=torch.int64)}, "floating-point"),
        ({"values": [[1.0]] * N}, "values must be a tensor or open_patterns"),
    ],
)
def test_what_cannot_be_streamed_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        retrieve(normal(B, D), TensorPatterns(normal(N, D)), **options)


def test_a_query_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"query must be \(\*batch, 6\)"):
        retrieve(normal(B, D + 1), TensorPatterns(normal(N, D)))


def test_mask_in_loop_false_is_refused():
    f = Retrieval(forgetting="pfu", mask_in_loop=False)
    with pytest.raises(ValueError, match="mask_in_loop=False needs all weights"):
        f.prepare(normal(B, D), TensorPatterns(normal(N, D)))


def test_one_mask_for_all_queries_may_have_a_row_of_its_own():
    patterns, query, mask = normal(N, D), normal(B, D, seed=2), one_mask()
    options = {"steps": 2, "forgetting": "pfu"}
    expected = retrieve(query, patterns, mask=mask, **options)
    same(expected, retrieve(query, TensorPatterns(patterns, 13), mask=mask[None], **options), **CLOSE)


@pytest.mark.parametrize("limit", [-1e9, -1e4, 1e4])
@pytest.mark.parametrize("bias", ["threshold", 0.0])
def test_a_threshold_far_from_all_scores_rounds_none_of_them(limit, bias):
    patterns, query = normal(N, D).float(), normal(B, D, seed=2).float()
    for unit in (PFU(limit, bias), PFU(limit, bias, min_keep=3)):
        dense = retrieve(query, patterns, forgetting=unit, steps=1)
        streamed = retrieve(query, TensorPatterns(patterns, 13), forgetting=unit, steps=1)
        assert_close(streamed.value, dense.value, rtol=1e-5, atol=2e-6)
        exactly((streamed.index, streamed.support), (dense.index, dense.support))


def test_values_as_a_source_get_their_gradient():
    values = normal(N, 3, seed=3).requires_grad_()
    for given_ in (values, TensorPatterns(values)):
        recall = retrieve(normal(B, D), TensorPatterns(normal(N, D, seed=2), 13), values=given_, steps=1)
        (slope,) = torch.autograd.grad(recall.value.sum(), values)
        assert_close(slope.sum(), torch.tensor(3.0 * B, dtype=F64))  # weights sum to 1 a query


def test_a_memory_passes_on_whether_it_is_streamed():
    memory, query = Memory(normal(N, D), labels=[str(n) for n in range(N)]), normal(B, D, seed=2)
    dense, streamed = (memory.recall(query, beta=9.0, stream=stream) for stream in (False, True))
    assert_close(streamed.value, dense.value, rtol=1e-4, atol=1e-5)  # two solves to the default tolerance
    assert streamed.labels == dense.labels
    exactly(streamed.ids, dense.ids)
    with pytest.raises(ValueError, match="needs all scores"):
        memory.recall(query, separation="sparsemax", stream=True)


def test_a_solve_by_hand_and_its_select():
    patterns, query = normal(N, D), normal(B, D, seed=2)
    beta = torch.linspace(1.0, 6.0, B, dtype=F64)
    f = Retrieval(beta, forgetting="pfu", inject="input")
    x = f.prepare(query, TensorPatterns(patterns, 13), masks())
    live = torch.tensor([True, False, True, False, False, True, True])
    part, rows = f.select(x, live)
    exactly(rows, live.nonzero()[:, 0])
    assert_close(f(query[live], part), f(query, x)[live], **CLOSE)
    solved = fixed_point(f, x, f.init(x), stop=TIGHT)
    assert_close(solved.value, f(solved.value, x), **CLOSE)
