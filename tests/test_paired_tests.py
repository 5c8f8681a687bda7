"""Tests of paired differences against slow twins."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hopdeq_lwpf.sweeps.reports.statistics import holm, sign_flip_test, t_interval, t_test

VALUES = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=7)


def slow_t_test(values):
    """Two-sided p by Simpson's rule over the density of Student's t."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    t, degrees = abs(mean) / math.sqrt(variance / n), n - 1
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    # s = t / sqrt(degrees) = tan(angle) makes the interval finite: dt = sqrt(degrees) / cos^2.
    low, pieces = math.atan(t / math.sqrt(degrees)), 2000
    step = (math.pi / 2 - low) / pieces
    total = 0.0
    for k in range(pieces + 1):
        weight = 1 if k in (0, pieces) else 4 if k % 2 else 2
        angle = low + k * step
        total += weight * scale * math.sqrt(degrees) * max(math.cos(angle), 0.0) ** (degrees - 1)
    return 2 * total * step / 3


@given(VALUES)
def test_the_t_test_is_the_tail_of_the_density(values):
    found = t_test(np.array(values))
    if len(set(values)) == 1:
        assert math.isnan(found)
    else:
        # Simpson's rule is good to far more than that for a smooth power of the cosine.
        assert found == pytest.approx(slow_t_test(values), abs=1e-7)


@given(VALUES)
def test_the_interval_at_one_minus_p_touches_zero(values):
    p = t_test(np.array(values))
    if not math.isnan(p) and 1e-6 < p < 1 - 1e-6:
        found = t_interval(np.array(values), 1 - p)
        assert min(abs(found.low), abs(found.high)) < 1e-6 * (1 + abs(found.mean) + found.high - found.low)


@given(VALUES)
def test_sign_flips_count_every_choice_of_signs(values):
    reached = 0
    for signs in itertools.product((1, -1), repeat=len(values)):
        reached += abs(sum(s * v for s, v in zip(signs, values, strict=True))) >= abs(sum(values)) - 1e-9
    assert sign_flip_test(np.array(values)) == pytest.approx(reached / 2 ** len(values))


def test_nan_marks_a_value_that_does_not_count():
    values = np.array([0.1, np.nan, 0.3, 0.15])
    assert t_test(values) == t_test(values[[0, 2, 3]])
    assert sign_flip_test(values) == 2 / 8
    assert math.isnan(t_test(np.array([0.1, np.nan])))
    assert math.isnan(sign_flip_test(np.array([np.nan])))


def test_equal_differences_know_no_scatter():
    assert math.isnan(t_test(np.array([0.3, 0.1 + 0.2, 0.3])))
    assert math.isnan(t_test(np.zeros(4)))
    assert sign_flip_test(np.zeros(4)) == 1
    assert sign_flip_test(np.full(5, 0.1)) == 2 / 32


def test_many_values_draw_their_flips_with_a_seed():
    values = np.round(8 * np.random.default_rng(3).normal(0.5, 1.0, 20))
    found = sign_flip_test(values)
    assert found == sign_flip_test(values) != sign_flip_test(values, seed=1)
    counts = {0: 1}  # of sign choices by their sum
    for value in values:
        sums = [(total + sign * value, count) for total, count in counts.items() for sign in (1, -1)]
        counts = {total: sum(c for t, c in sums if t == total) for total, _ in sums}
    exact = sum(count for total, count in counts.items() if abs(total) >= abs(values.sum())) / 2**20
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    assert sign_flip_test(np.full(20, 1.0)) == pytest.approx(1 / 20001)


def slow_holm(ps):
    """The smallest level at which the step-down procedure rejects each hypothesis, by trying the levels that matter."""
    known = [(p, place) for place, p in enumerate(ps) if not math.isnan(p)]
    levels = sorted({min(1.0, k * p) for p, _ in known for k in range(1, len(known) + 1)} | {1.0})
    adjusted = list(ps)
    for place, p in enumerate(ps):
        if math.isnan(p):
            continue
        for level in levels:
            rejected, left = set(), sorted(known)
            while left and len(left) * left[0][0] <= level * (1 + 1e-12):
                rejected.add(left.pop(0)[1])
            if place in rejected:
                adjusted[place] = level
                break
        else:
            adjusted[place] = 1.0
    return adjusted


@given(st.lists(st.one_of(st.integers(0, 100).map(lambda n: n / 100), st.just(math.nan)), max_size=6))
def test_holm_is_the_level_at_which_the_procedure_rejects(ps):
    assert holm(ps) == pytest.approx(slow_holm(ps), nan_ok=True)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([]) == []


def test_holm_rejects_true_hypotheses_no_more_often_than_it_says():
    draw = np.random.default_rng(0)
    wrong = sum(min(holm(list(draw.uniform(size=8)))) <= 0.1 for _ in range(2000))
    # 1 - (1 - 0.1 / 8)^8 = 0.096; four standard deviations of 2,000 draws.
    assert wrong / 2000 == pytest.approx(0.096, abs=4 * math.sqrt(0.096 * 0.904 / 2000))
