"""Shares of the space, radii, near neurons and bounds against whole numbers and recorded values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hopdeq_lwpf.models.sdm.addresses import (
    log_space_fraction,
    nearest_neuron_radius,
    neuron_within,
    radius_for_fraction,
    space_fraction,
)
from hopdeq_lwpf.models.sdm.bounds import analytic_beta, exponential_bounds
from hopdeq_lwpf.models.sdm.counting import log1mexp
from hopdeq_lwpf.models.sdm.intersections import (
    log_circle_intersection,
)
from tests.references_sdm import (
    ball,
    bits_and_radius,
    doubles,
    log_share,
    recorded,
)


@given(bits_and_radius(300))
def test_shares_of_the_space_equal_sums_of_whole_numbers(problem):
    n, d = problem
    actual = log_space_fraction(n, d).item()
    if 2 * d < n:
        assert actual == pytest.approx(log_share(ball(n, d), n), rel=1e-11)
    else:  # by the points outside: next to 1 the share itself has no digits left
        assert actual == pytest.approx(math.log1p(-((2**n - ball(n, d)) / 2**n)), rel=1e-11)


@given(bits_and_radius(300))
def test_the_radius_of_a_share_undoes_the_share(problem):
    n, d = problem
    p = space_fraction(n, d).item()
    if 0 < p < 1 - 1e-12:
        assert radius_for_fraction(n, p) == d
    if 0 < p < 0.9:  # a little more than the share needs one more bit
        assert radius_for_fraction(n, p * (1 + 1e-9)) == d + 1


def test_complements_keep_their_digits_at_both_ends():
    actual = log1mexp(doubles(-1e-20, -0.5, -1.0, -50.0, -math.inf))
    expected = [
        math.log(1e-20),
        math.log(1 - math.exp(-0.5)),
        math.log(1 - math.exp(-1)),
        -math.exp(-50),
        0.0,
    ]
    assert_close(actual, doubles(*expected), rtol=1e-14, atol=0)


@pytest.mark.parametrize("case", recorded("space_frac"), ids=lambda case: case["id"])
def test_the_radii_of_the_recorded_shares(case):
    where = case["inputs"]
    assert [radius_for_fraction(where["n"], p) for p in where["space_fracs"]] == case["value"]


@pytest.mark.parametrize("case", recorded("P(at least one"), ids=lambda case: case["id"])
def test_the_chance_of_a_near_neuron(case):
    where = case["inputs"]
    assert neuron_within(where["n"], where["d"], where["r"]).item() == pytest.approx(
        case["value"], rel=case["rtol"]
    )
    normal = neuron_within(where["n"], where["d"], where["r"], method="normal").item()
    assert normal == pytest.approx(case["repo_normal_approx"], rel=1e-9)


def test_the_chance_of_a_near_neuron_at_its_ends():
    assert neuron_within(10, 10, 3).item() == 1.0
    assert neuron_within(10, 0, 1).item() == pytest.approx(2**-10)
    # One neuron in 2**200 addresses: 1 - (1 - F) would be 0.
    assert neuron_within(200, 0, 1).item() == pytest.approx(2.0**-200)
    assert neuron_within(10, torch.tensor([[0, 1]]), 5).shape == (1, 2)


def test_the_radius_with_one_neuron_expected():
    (case,) = recorded("neuron_addr_ppf")
    normal = nearest_neuron_radius(1000, 10**6, method="normal")
    assert normal == pytest.approx(case["value"], rel=case["rtol"])
    exact = int(nearest_neuron_radius(1000, 10**6))
    assert 1e6 * space_fraction(1000, exact).item() >= 1 > 1e6 * space_fraction(1000, exact - 1).item()


def terms(n: int, d: int, dv: int) -> list[int]:
    return [
        math.comb(dv, i) * math.comb(n - dv, j)
        for i in range(dv + 1)
        for j in range(n - dv + 1)
        if max(i, dv - i) + j <= d
    ]


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_the_bounds_by_the_term_itself_are_the_largest_of_all_terms(n):
    for d in range(n + 1):
        bounds = exponential_bounds(n, d, form="term")
        largest = [terms(n, d, dv) for dv in range(n + 1)]
        expected = doubles(*(log_share(max(some, default=0), n) for some in largest))
        above = doubles(*(log_share(max(some, default=0) * len(some), n) for some in largest))
        assert_close(bounds.lower, expected, rtol=0, atol=1e-12)
        assert_close(bounds.upper, above, rtol=0, atol=1e-12)
        assert bool(bounds.lower_holds.all() & bounds.upper_holds.all())


@settings(max_examples=50)
@given(bits_and_radius(300), st.sampled_from(["normal", "taylor", "term"]))
def test_flags_say_where_the_bounds_hold(problem, form):
    n, d = problem
    bounds = exponential_bounds(n, d, form=form)
    assert_close(bounds.exact, log_circle_intersection(n, d), rtol=0, atol=0)
    assert not bool(bounds.lower.isnan().any() | bounds.upper.isnan().any())
    assert bounds.lower_holds.tolist() == (bounds.lower <= bounds.exact + 1e-10).tolist()
    assert bounds.upper_holds.tolist() == (bounds.upper >= bounds.exact - 1e-10).tolist()
    if form == "term":
        assert bool(bounds.lower_holds.all() & bounds.upper_holds.all())


@pytest.mark.parametrize("case", recorded("Appendix exponential"), ids=lambda case: case["id"])
def test_bounds_equal_the_recorded_values(case):
    n, d, dv = (case["inputs"][name] for name in ("n", "d", "dv"))
    for form, name in [
        ("normal", "normal_largest_term"),
        ("taylor", "taylor"),
        ("term", "largest_term_exact"),
    ]:
        bounds = exponential_bounds(n, d, form=form)
        assert bounds.lower[dv].exp().item() == pytest.approx(case["value"][name], rel=case["rtol"])
        assert bounds.exact[dv].exp().item() == pytest.approx(case["value"]["exact"], rel=case["rtol"])
        assert bounds.beta == pytest.approx(case["value"]["beta_analytic"], rel=1e-12)
    assert analytic_beta(n, d) == pytest.approx((n - 2 * d) ** 2 / (4 * n), rel=1e-12)


def test_the_published_lower_bound_is_none_at_64_bits_and_holds_at_1000():
    small, large = exponential_bounds(64, 11), exponential_bounds(1000, 451)
    assert not bool(small.lower_holds[1:23].any())
    assert bool(large.lower_holds[1:800].all())
    assert bool(large.upper_holds[:1000].all())


BAD = [
    (lambda: radius_for_fraction(10, 0.0), "p must be a number strictly between 0 and 1, got 0.0"),
    (lambda: radius_for_fraction(10, 1), "p must be a number strictly between 0 and 1, got 1"),
    (lambda: radius_for_fraction(10, math.nan), "p must be a number strictly between 0 and 1"),
    (lambda: neuron_within(10, 3, 5, method="gauss"), "method 'gauss' is not one of"),
    (lambda: neuron_within(10, 3, -5), "neurons must be"),
    (lambda: nearest_neuron_radius(10, 1), "neurons must be a finite number above 1, got 1"),
    (lambda: nearest_neuron_radius(10, 5, method="exakt"), "Did you mean 'exact'"),
    (lambda: exponential_bounds(8, 9), "d must be a whole number"),
    (lambda: exponential_bounds(8, 2, form="norml"), "Did you mean 'normal'"),
    (lambda: analytic_beta(8, 9), "d must be a whole number"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_one_line_that_says_what_is_allowed(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
