"""Separation, bounds, storage and capacity: against slow twins, against the paper's numbers, against measurement."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hopdeq_lwpf.diagnostics import (
    capacity,
    jacobian_bound,
    log_lambert_w,
    one_step_error_bound,
    retrieval_error_bound,
    separation_of,
    single_fixed_point,
    storage_condition,
)
from hopdeq_lwpf.separation import Separation

F64 = torch.float64
# What rounding leaves of a measured distance in float64, over M: sums of at most 64 products, some steps.
ROUNDING = 1e-13


def slow_separation(patterns, ignored):
    """Delta_i by its definition, one pair of patterns at a time."""
    dots = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in patterns] for x in patterns]
    found = []
    for i, row in enumerate(dots):
        others = [row[j] for j in range(len(patterns)) if j != i and not ignored[j]]
        found.append(math.nan if ignored[i] else row[i] - max(others, default=-math.inf))
    return found


@given(st.data())
def test_separation_is_the_slow_twin_for_any_block_and_mask(data):
    sets, count, width = (data.draw(st.integers(1, most)) for most in (2, 7, 3))
    numbers = data.draw(
        st.lists(st.integers(-4, 4), min_size=sets * count * width, max_size=sets * count * width)
    )
    dtype = data.draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)))
    patterns = torch.tensor(numbers, dtype=dtype).reshape(sets, count, width) / 2
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    mask = data.draw(st.sampled_from((None, torch.tensor(flags))))
    found = separation_of(patterns, mask=mask, block=data.draw(st.integers(1, 8)))
    ignored = flags if mask is not None else [False] * count
    slow = torch.tensor([slow_separation(one, ignored) for one in patterns.tolist()], dtype=found.dtype)
    # Halves of small integers are exact in every dtype, and so are their sums of products in float32.
    assert_close(found, slow, rtol=0, atol=0, equal_nan=True)
    assert found.dtype == (dtype if dtype in (torch.float64, torch.float32) else torch.float32)


def test_separation_has_a_gradient():
    patterns = torch.randn(5, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(separation_of, (patterns,))


def test_a_pattern_alone_is_separated_from_nothing_and_one_stored_twice_not_at_all():
    assert separation_of(torch.ones(1, 3)).tolist() == [math.inf]
    assert separation_of(torch.ones(2, 3)).tolist() == [0, 0]


def slow_bounds(patterns, beta, offset):
    """Theorems 4 and 5 and the storage condition, written out."""
    n, delta = len(patterns), slow_separation(patterns, [False] * len(patterns))
    m = max(math.sqrt(math.fsum(a * a for a in row)) for row in patterns)
    weight = [(n - 1) * math.exp(-beta * (d - 2 * offset * m)) for d in delta]
    required = 2 / (beta * n) + math.log(2 * (n - 1) * n * beta * m * m) / beta
    return {
        "one_step": [2 * w * m for w in weight],
        "jacobian": [2 * beta * n * m * m * w for w in weight],
        "retrieval": [2 * math.e * (n - 1) * m * math.exp(-beta * d) for d in delta],
        "stored": [d >= required for d in delta],
        "required": [required],
        "radius": [1 / (beta * n * m)],
    }


@pytest.mark.parametrize("masked", [False, True])
def test_bounds_are_their_formulas_and_masked_patterns_take_no_part(masked):
    patterns = torch.randn(6, 5, dtype=F64)
    slow = slow_bounds(patterns.tolist(), 2.5, 0.3)
    mask = None
    if masked:  # one more pattern, so long that it would change every bound, and NaN
        patterns = torch.cat([patterns, torch.full((1, 5), torch.nan, dtype=F64)])
        mask = torch.tensor([False] * 6 + [True])
    arguments = {"beta": 2.5, "mask": mask}
    storage = storage_condition(patterns, **arguments)
    found = {
        "one_step": one_step_error_bound(patterns, offset=0.3, **arguments)[:6],
        "jacobian": jacobian_bound(patterns, offset=0.3, **arguments)[:6],
        "retrieval": retrieval_error_bound(patterns, **arguments)[:6],
        "stored": storage.stored[:6],
        "required": storage.required,
        "radius": storage.radius,
    }
    for name, value in slow.items():
        assert_close(found[name], torch.tensor(value, dtype=found[name].dtype), msg=name)
    assert_close(storage.error_bound[:6], found["retrieval"])
    assert not (masked and bool(storage.stored[6]))


def test_the_larger_of_the_two_offsets_counts():
    patterns = torch.randn(4, 3, dtype=F64)
    far = one_step_error_bound(patterns, 1.0, 0.7)
    assert_close(one_step_error_bound(patterns, 1.0, 0.1, fixed_point_offset=0.7), far, rtol=0, atol=0)
    assert_close(one_step_error_bound(patterns, 1.0, 0.7, fixed_point_offset=0.1), far, rtol=0, atol=0)


def test_sets_of_patterns_are_bounded_as_one_by_one():
    patterns, beta = torch.randn(3, 5, 4, dtype=F64), torch.tensor([1.0, 2.0, 8.0], dtype=F64)
    together = storage_condition(patterns, beta)
    for i in range(3):
        alone = storage_condition(patterns[i], float(beta[i]))
        for name in ("stored", "separation", "required", "radius", "error_bound"):
            assert_close(getattr(together, name)[i], getattr(alone, name))


def test_one_pattern_is_stored_without_error():
    storage = storage_condition(torch.ones(1, 3), 2.0)
    assert storage.stored.tolist() == [True]
    assert storage.error_bound.tolist() == [0]
    assert one_step_error_bound(torch.ones(1, 3), 2.0, 5.0).tolist() == [0]
    assert "1 of 1 patterns are stored" in str(storage)


# --- theory beside measurement


def update(state, patterns, beta):
    """One softmax step, written from the definition: (N, d) states of (N, d) patterns."""
    scores = beta * state @ patterns.T
    top = (scores - scores.amax(-1, keepdim=True)).exp()
    return top / top.sum(-1, keepdim=True) @ patterns


def jacobian_at(state, patterns, beta):
    """df/dz, (d, d), by automatic differentiation."""
    return torch.autograd.functional.jacobian(lambda z: update(z[None], patterns, beta)[0], state)


def stores(count):
    """Random stores: patterns of unequal norms, beta, and one query near each pattern with its offset."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high):
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=F64))

    for _ in range(count):
        n, d = int(uniform(2, 65)), int(uniform(2, 65))
        patterns = torch.randn(n, d, generator=generator, dtype=F64)
        lengths = uniform(0.3, 3) * (1 + uniform(0, 0.5) * torch.rand(n, 1, generator=generator, dtype=F64))
        patterns = lengths * patterns / patterns.norm(dim=-1, keepdim=True)
        beta = math.exp(uniform(math.log(0.1), math.log(100)))
        push = torch.randn(n, d, generator=generator, dtype=F64)
        offset = uniform(0, 1) ** 2 * torch.rand(n, 1, generator=generator, dtype=F64)
        yield patterns, beta, patterns + offset * push / push.norm(dim=-1, keepdim=True)


def test_no_measured_error_exceeds_its_bound_in_a_thousand_stores():
    telling = dict.fromkeys(("one_step", "jacobian", "stored"), 0)
    for number, (patterns, beta, query) in enumerate(stores(1000)):
        longest = float(patterns.norm(dim=-1).max())
        offset = (query - patterns).norm(dim=-1)
        bound = one_step_error_bound(patterns, beta, offset)
        error = (update(query, patterns, beta) - patterns).norm(dim=-1)
        assert bool((error <= bound + ROUNDING * longest).all())
        # Two points of a ball of radius M are never more than 2 M apart: a larger bound says nothing.
        telling["one_step"] += bool((bound < 2 * longest).any())
        if number % 10 == 0:
            jacobian = jacobian_at(query[0], patterns, beta)
            limit = float(jacobian_bound(patterns, beta, offset)[0])
            norm = float(torch.linalg.matrix_norm(jacobian, 2))
            assert norm <= limit * (1 + 1e-9) + ROUNDING * beta * longest**2
            # Without any theorem |J| <= beta M^2, since J is beta times a covariance.
            telling["jacobian"] += limit < beta * longest**2
        stored = storage_condition(patterns, beta)
        rows = stored.stored.nonzero().squeeze(1)
        if not len(rows):
            continue
        end = patterns
        for _ in range(200):
            end = update(end, patterns, beta)
        moved = (end - patterns).norm(dim=-1)[rows]
        assert bool((moved <= stored.radius + ROUNDING * longest).all())
        assert bool((moved <= stored.error_bound[rows] + ROUNDING * longest).all())
        telling["stored"] += bool((stored.error_bound[rows] < 0.1 * longest).any())
    assert telling["one_step"] > 500
    assert telling["jacobian"] > 10  # of 100
    assert telling["stored"] > 250


def test_a_bound_that_forgets_a_factor_would_be_seen():
    # Nearly tight: two opposite patterns and a query pushed straight towards the other one.
    patterns = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    query = patterns * 0.5
    error = (update(query, patterns, 6.0) - patterns).norm(dim=-1)
    bound = one_step_error_bound(patterns, 6.0, 0.5)
    assert bool((error <= bound).all())
    assert bool((error > 0.99 * bound).all())


def test_where_one_fixed_point_is_certain_all_queries_meet():
    certain = 0
    for patterns, beta, query in stores(200):
        if not bool(single_fixed_point(patterns, beta)):
            continue
        certain += 1
        state = torch.cat([query, patterns])
        before = torch.cdist(state, state).max()
        after = update(state, patterns, beta)
        assert float(torch.cdist(after, after).max()) < float(before)
    assert certain > 20
    assert not bool(single_fixed_point(torch.eye(4), 100.0))


# --- capacity


def test_capacity_of_the_paper():
    # Ramsauer et al. 2021, theorem 3: its two examples, to the digits that are printed there.
    first = capacity(20, beta=1.0, scale=3.0, failure=0.001)
    assert first.c == pytest.approx(3.1546, abs=5e-5)
    second = capacity(75, beta=1.0, scale=1.0, failure=0.001)
    assert second.c == pytest.approx(1.3718, abs=2e-4)
    for found, d in ((first, 20), (second, 75)):
        assert found.holds
        assert found.patterns == pytest.approx(math.sqrt(0.001) * found.c ** ((d - 1) / 4))
        assert found.c >= (2 / math.sqrt(0.001)) ** (4 / (d - 1))
        # c solves its defining equation: W = b / c, W exp(W) = exp(a + ln b).
        w = found.b / found.c
        assert w + math.log(w) == pytest.approx(found.a + math.log(found.b), abs=1e-12)
    assert "at least" in str(first)


def test_capacity_says_where_the_theorem_promises_nothing():
    small = capacity(10)
    assert not small.holds
    assert "no capacity is guaranteed" in str(small)
    assert small.c < (2 / math.sqrt(0.001)) ** (4 / 9)
    assert math.isinf(capacity(100_000, scale=3.0).patterns)
    assert math.isfinite(capacity(100_000, scale=3.0).log_patterns)


@given(st.floats(-1e6, 1e6))
def test_lambert_w_solves_its_equation(y):
    u = log_lambert_w(y)
    # Newton ends within rounding of the numbers that are added.
    assert math.exp(u) + u == pytest.approx(y, rel=1e-14, abs=1e-14)


def test_lambert_w_at_known_points():
    assert math.exp(log_lambert_w(1.0)) == pytest.approx(1.0)  # W(e) = 1
    assert math.exp(log_lambert_w(0.0)) == pytest.approx(0.5671432904097838)  # the omega constant
    with pytest.raises(ValueError, match="y must be finite"):
        log_lambert_w(math.inf)


# --- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: separation_of([[1.0]]), TypeError, "patterns must be a torch.Tensor"),
        (lambda: separation_of(torch.ones(3, 2, dtype=torch.int64)), TypeError, "floating-point"),
        (lambda: separation_of(torch.ones(3)), ValueError, r"patterns must be \(\.\.\., N, d\)"),
        (lambda: separation_of(torch.ones(0, 3)), ValueError, "at least one pattern"),
        (lambda: separation_of(torch.ones(3, 0)), ValueError, "at least one number"),
        (lambda: separation_of(torch.tensor([[1.0], [torch.nan]])), ValueError, "NaN or inf in 1 rows"),
        (lambda: separation_of(torch.ones(3, 2), block=0), ValueError, "block must be an integer >= 1"),
        (lambda: separation_of(torch.ones(3, 2), mask=torch.ones(3)), TypeError, "mask must be a bool"),
        (
            lambda: separation_of(torch.ones(3, 2), mask=torch.ones(2, dtype=torch.bool)),
            ValueError,
            "mask has shape",
        ),
        (
            lambda: storage_condition(torch.eye(3), 0.0),
            ValueError,
            "beta must be a finite number > 0, got 0.0",
        ),
        (lambda: storage_condition(torch.eye(3), math.nan), ValueError, "beta must be a finite"),
        (lambda: storage_condition(torch.eye(3), torch.ones(2)), ValueError, "beta of shape"),
        (
            lambda: one_step_error_bound(torch.eye(3), 1.0, -0.1),
            ValueError,
            "offset must hold finite distances",
        ),
        (lambda: one_step_error_bound(torch.eye(3), 1.0, torch.ones(2)), ValueError, "offset of shape"),
        (
            lambda: jacobian_bound(torch.eye(3), 1.0, 0.0, fixed_point_offset=math.inf),
            ValueError,
            "fixed_point_offset must hold finite",
        ),
        (
            lambda: retrieval_error_bound(torch.eye(3), 1.0, separation="sparsemax"),
            ValueError,
            "hold for separation='softmax' only",
        ),
        (lambda: storage_condition(torch.eye(3), 1.0, separation=Separation()), ValueError, "softmax' only"),
        (
            lambda: storage_condition(torch.eye(3), 1.0, separation="sofmax"),
            ValueError,
            "Did you mean 'softmax'",
        ),
        (lambda: capacity(1), ValueError, "dim must be an integer >= 2"),
        (lambda: capacity(20, beta=-1.0), ValueError, "beta must be"),
        (lambda: capacity(20, scale=0.0), ValueError, "scale must be"),
        (lambda: capacity(20, failure=0.0), ValueError, "failure must be"),
    ],
)
def test_bad_input_is_one_line_that_names_it(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_study_of_the_benchmarks_finds_no_bound_exceeded():
    theory = pytest.importorskip("benchmarks.theory")
    rows = theory.run(20)
    assert len(rows) == 9
    assert sum(row["above bound"] for row in rows) == 0
    assert all(row["telling %"] > 30 for row in rows if row["beta M^2"] == "100 to 1000")
