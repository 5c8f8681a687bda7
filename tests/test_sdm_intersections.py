"""Circle and selected-coordinate intersections against counting and recorded values."""

import math
import time

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from hopdeq_lwpf.models.sdm.addresses import (
    log_space_fraction,
)
from hopdeq_lwpf.models.sdm.intersections import (
    expected_shared_neurons,
    log_circle_intersection,
    log_selected_intersection,
)
from tests.references_sdm import (
    ROUNDING,
    bits_and_radius,
    counted,
    doubles,
    log_share,
    normal_tail,
    number,
    recorded,
    selected,
    shared,
)


@pytest.mark.parametrize("n", range(1, 13))
def test_circles_equal_the_count_of_every_point(n):
    expected = doubles(*([log_share(count, n) for count in row] for row in counted(n)))
    assert_close(log_circle_intersection(n, range(n + 1)), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("n", "d"), [(200, 60), (201, 100), (1000, 451), (1000, 560), (4096, 2000), (10_000, 4800)]
)
def test_circles_equal_sums_of_whole_numbers(n, d):
    table = log_circle_intersection(n, d)
    for dv in (0, 1, 2, n // 7, n // 2, n - 1, n):
        assert_close(table[dv], doubles(log_share(shared(n, d, dv), n))[0], rtol=1e-12, atol=ROUNDING)


@pytest.mark.parametrize("case", recorded("circle_intersection_log"), ids=lambda case: case["id"])
def test_circles_equal_the_recorded_values(case):
    where = case["inputs"]
    actual = log_circle_intersection(where["n"], where["d"])[where["dv"]]
    assert_close(actual, doubles(number(case["value"]))[0], rtol=case["rtol"], atol=0)
    if "exact_expected_neurons" in case:
        shares = expected_shared_neurons(where["n"], where["d"], number(case["repo_r"]))
        assert shares[where["dv"]].item() == pytest.approx(case["exact_expected_neurons"], rel=1e-9)


def test_the_tiny_recorded_counts_and_the_recorded_mean():
    (tiny,) = recorded("tiny_intersections")
    counts = 2**16 * log_circle_intersection(16, 5).exp()
    assert_close(counts, doubles(*tiny["value"]), rtol=1e-12, atol=0)
    (mean,) = recorded("identity_mean")
    odds = doubles(*(log_share(math.comb(64, dv), 64) for dv in range(65)))
    actual = torch.logsumexp(odds + log_circle_intersection(64, 11), 0).exp().item()
    assert actual == pytest.approx(mean["value"], rel=mean["rtol"])


@given(bits_and_radius())
def test_an_even_bit_takes_no_address_away(problem):
    n, d = problem
    table = log_circle_intersection(n, d)
    for k in range(1, n // 2 + 1):
        assert table[2 * k - 1] == table[2 * k]


@given(bits_and_radius())
def test_circles_meet_exactly_up_to_twice_the_radius(problem):
    n, d = problem
    met = log_circle_intersection(n, d) > -math.inf
    assert met.tolist() == [dv <= 2 * d for dv in range(n + 1)]


@given(bits_and_radius())
def test_the_mean_over_random_points_is_the_square_of_the_share(problem):
    n, d = problem
    odds = doubles(*(log_share(math.comb(n, dv), n) for dv in range(n + 1)))
    mean = torch.logsumexp(odds + log_circle_intersection(n, d), 0)
    assert_close(mean, 2 * log_space_fraction(n, d), rtol=1e-12, atol=ROUNDING)


@given(bits_and_radius())
def test_circles_shrink_with_the_distance_and_grow_with_the_radius(problem):
    n, d = problem
    table = log_circle_intersection(n, [max(d - 1, 0), d])
    assert bool((table[:, 1:] <= table[:, :-1] + ROUNDING).all())
    assert bool((table[0] <= table[1] + ROUNDING).all())
    assert bool((table <= 0).all())


def test_no_distance_between_points_leaves_the_share_of_one_circle():
    tables = log_circle_intersection(97, range(98))
    assert_close(tables[:, 0], log_space_fraction(97, range(98)), rtol=1e-12, atol=ROUNDING)


def test_several_radii_at_once_are_the_same_numbers_in_their_shape():
    radii = torch.tensor([[0, 300, 451], [500, 999, 1000]])
    together = log_circle_intersection(1000, radii)
    assert together.shape == (2, 3, 1001)
    assert together.dtype == torch.float64
    for row, column in [(0, 1), (0, 2), (1, 0), (1, 2)]:
        alone = log_circle_intersection(1000, int(radii[row, column]))
        assert alone.shape == (1001,)
        assert_close(together[row, column], alone, rtol=0, atol=0)
    assert log_circle_intersection(10, torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2, 11)
    assert log_circle_intersection(10, []).shape == (0, 11)


def test_more_radii_than_one_block_holds_are_the_same_numbers():
    many = log_circle_intersection(600, range(601))
    assert_close(many[[0, 270, 470, 600]], log_circle_intersection(600, [0, 270, 470, 600]), rtol=0, atol=0)


def test_far_circles_keep_the_digits_that_the_lune_formula_loses():
    # Where the authors' code returns 3.4e-10 points and 0 (and 1.8e308 or 0 for n > 1029).
    for n, d, dv in [(1000, 451, 900), (784, 290, 400), (64, 27, 54), (2000, 900, 1500)]:
        expected = log_share(shared(n, d, dv), n)
        assert log_circle_intersection(n, d)[dv].item() == pytest.approx(expected, abs=ROUNDING)
    assert log_circle_intersection(64, 27)[55] == -math.inf


@pytest.mark.parametrize("case", recorded("expected shared"), ids=lambda case: case["id"])
def test_the_book_integral_is_low_by_what_was_recorded(case):
    where = case["inputs"]
    exact = expected_shared_neurons(where["n"], where["d"], where["r"])[where["dv"]].item()
    book = expected_shared_neurons(where["n"], where["d"], where["r"], method="book")[where["dv"]].item()
    assert exact == pytest.approx(case["value"], rel=case["rtol"])
    assert book == pytest.approx(case["continuous_approx"], rel=case["rtol"])
    assert 0.07 < 1 - book / exact < 0.15


@pytest.mark.parametrize(("n", "d", "dv"), [(64, 11, 3), (64, 32, 20), (1000, 451, 100), (1000, 451, 700)])
def test_the_book_integral_is_its_integral(n, d, dv):
    # In x as Kanerva wrote it, by the middle of 200,000 slices; what 1 - x near 0 costs is below 1e-4.
    square, steps = (2 * d - n) ** 2 / n, 200_000
    width = (1 - dv / n) / steps
    total = 0.0
    for k in range(steps):
        x = dv / n + (k + 0.5) * width
        total += math.exp(-square / (2 * (1 - x))) / (2 * math.pi * math.sqrt(x * (1 - x)))
    actual = log_circle_intersection(n, d, method="book")[dv].item()
    assert actual == pytest.approx(math.log(total * width), abs=2e-3)


@pytest.mark.parametrize("d", [420, 500, 530, 600])
def test_the_book_integral_without_distance_is_the_normal_share_of_the_circle(d):
    actual = log_circle_intersection(1000, d, method="book")
    assert actual[0].item() == pytest.approx(math.log(normal_tail((500 - d) / math.sqrt(250))), abs=1e-12)
    assert bool((actual[1:] <= actual[:-1]).all())


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_selected_coordinates_equal_the_count_of_every_neuron(n):
    for k in range(n + 1):
        expected = [selected(n, k, dv) for dv in range(n + 1)]
        assert_close(
            log_selected_intersection(n, k).exp(), doubles(*map(float, expected)), rtol=1e-12, atol=1e-15
        )


@given(bits_and_radius(100))
def test_selected_coordinates_have_the_square_of_the_share_as_their_mean_too(problem):
    n, k = problem
    odds = doubles(*(log_share(math.comb(n, dv), n) for dv in range(n + 1)))
    mean = torch.logsumexp(odds + log_selected_intersection(n, [k, 0]), -1)
    assert_close(mean, doubles(-2 * k * math.log(2), 0.0), rtol=1e-12, atol=ROUNDING)


def test_ten_thousand_bits_take_well_under_a_second():
    # 0.6 ms on one core: the sum is over distances, not over points.
    start = time.perf_counter()
    log_circle_intersection(10_000, 4800)
    assert time.perf_counter() - start < 1


BAD = [
    (lambda: log_circle_intersection(0, 0), "n must be a whole number of at least 1, got 0"),
    (lambda: log_circle_intersection(2.5, 1), "n must be a whole number"),
    (lambda: log_circle_intersection(True, 1), "n must be a whole number"),
    (
        lambda: log_circle_intersection(10, 11),
        "d must be a whole number of at least 0 and at most 10, got 11",
    ),
    (lambda: log_circle_intersection(10, -1), "d must be a whole number"),
    (lambda: log_circle_intersection(10, 2.0), "d must be a whole number"),
    (lambda: log_circle_intersection(10, "3"), "d must be a whole number"),
    (lambda: log_circle_intersection(10, [1, 11]), "d must be a whole number"),
    (lambda: log_circle_intersection(10, torch.tensor([1, 11])), "d must be between 0 and n = 10, got 11"),
    (lambda: log_circle_intersection(10, torch.tensor([1.0])), r"d must hold whole numbers.*use d.long\(\)"),
    (lambda: log_circle_intersection(10, 3, method="bok"), "Did you mean 'book'"),
    (lambda: log_selected_intersection(10, 11), "k must be a whole number"),
    (lambda: expected_shared_neurons(10, 3, 0), "neurons must be a finite number above 0, got 0"),
    (lambda: expected_shared_neurons(10, 3, math.inf), "neurons must be a finite number"),
    (lambda: expected_shared_neurons(10, 3, 10**400), "neurons must be a finite number"),
    (lambda: expected_shared_neurons(10, 3, "many"), "neurons must be a finite number"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_one_line_that_says_what_is_allowed(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
