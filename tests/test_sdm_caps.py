"""Cap intersections against the sphere slice by slice, random points and recorded values."""

import math

import pytest
import torch
from torch.testing import assert_close

from hopdeq_lwpf.models.sdm.caps import log_cap_fraction, log_cap_intersection
from tests.references_sdm import (
    cap_share,
    cap_table,
    doubles,
    recorded,
)


@pytest.mark.parametrize("case", recorded("log fraction of sphere"), ids=lambda case: case["id"])
def test_caps_equal_the_recorded_values(case):
    where = case["inputs"]
    cosine = doubles(where.get("cosine", 1.0))
    actual = log_cap_intersection(where["n"], where["hamm_radius"], cosine).item()
    assert actual == pytest.approx(case["value"], rel=case["rtol"])


@pytest.mark.parametrize(("n", "d"), [(3, 1), (4, 1.5), (5, 1.2), (7, 3.4), (8, 4), (6, 4.2), (9, 6)])
def test_caps_equal_the_sphere_slice_by_slice(n, d):
    theta = math.acos(1 - 2 * d / n)
    for psi in (0.3, 0.9, 1.5, 2.6):
        expected = cap_share(n, theta, psi)
        actual = log_cap_intersection(n, d, doubles(math.cos(psi))).exp().item()
        # 2,000 slices of angles that are rounded to 1/2,000 of pi
        assert actual == pytest.approx(expected, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize(("n", "d"), [(3, 1), (6, 2), (6, 4), (10, 4)])
def test_caps_equal_the_share_of_random_points(n, d):
    points = torch.nn.functional.normalize(torch.randn(200_000, n, dtype=torch.float64), dim=1)
    psi = 0.7
    second = math.cos(psi) * points[:, 0] + math.sin(psi) * points[:, 1]
    level = 1 - 2 * d / n
    hits = ((points[:, 0] >= level) & (second >= level)).double().mean().item()
    actual = log_cap_intersection(n, d, doubles(math.cos(psi))).exp().item()
    assert actual == pytest.approx(hits, abs=5 * math.sqrt(hits * (1 - hits) / 200_000))


def test_caps_of_a_circle_are_arcs():
    theta = math.acos(1 - 2 * 0.5 / 2)
    for psi in (0.0, 0.4, 1.9):
        actual = log_cap_intersection(2, 0.5, doubles(math.cos(psi))).exp().item()
        assert actual == pytest.approx((2 * theta - psi) / (2 * math.pi), rel=1e-12)


@pytest.mark.parametrize("n", [3, 4, 9])
def test_one_cap_is_the_share_within_its_angle(n):
    table = cap_table(n, 3000)
    for place in (300, 1500, 2400):
        angle = place * math.pi / 3000
        actual = log_cap_fraction(n, n * (1 - math.cos(angle)) / 2)
        assert actual == pytest.approx(math.log(table[place]), abs=1e-4)


def test_caps_end_where_they_no_longer_meet():
    # theta = 60 degrees: at 120 degrees between the centres they touch.
    cosine = doubles(-0.49, -0.51, -1.0, 1.0, 1.0 + 1e-9, -1.5)
    value = log_cap_intersection(8, 2.0, cosine)
    assert value[0] > -math.inf
    assert value[[1, 2, 5]].tolist() == [-math.inf] * 3
    assert value[3] == value[4]
    assert log_cap_intersection(8, 0, doubles(1.0, 0.0)).tolist() == [-math.inf, -math.inf]
    assert log_cap_intersection(8, 8, doubles(1.0, -1.0)).tolist() == [0.0, 0.0]
    assert bool((log_cap_intersection(8, 6, doubles(-1.0, 0.0)) > -math.inf).all())


def test_half_spheres_overlap_by_the_angle_left():
    psi = doubles(0.0, 0.5, 1.5, 3.0)
    for n in (2, 3, 64, 10_000):
        actual = log_cap_intersection(n, n / 2, psi.cos()).exp()
        assert_close(actual, (math.pi - psi) / (2 * math.pi), rtol=1e-9, atol=0)


def test_caps_of_ten_thousand_dimensions_stay_finite_and_fall():
    cosine = torch.linspace(1, -0.2, 500, dtype=torch.float64)
    value = log_cap_intersection(10_000, 4800, cosine)
    assert bool(value.isfinite().all())
    assert bool((value[1:] < value[:-1]).all())
    small = log_cap_intersection(10_000, 1000, cosine)
    assert bool((small[1:] <= small[:-1]).all())
    assert not bool(small.isnan().any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cosines_of_any_precision_and_shape_give_double(dtype):
    cosine = torch.rand(2, 0, 3).to(dtype)
    assert log_cap_intersection(64, 11, cosine).shape == (2, 0, 3)
    cosine = torch.tensor([[1.0, 0.5], [0.25, -1.0]], dtype=dtype)
    value = log_cap_intersection(64, 11, cosine)
    assert value.dtype == torch.float64
    assert_close(value, log_cap_intersection(64, 11, cosine.double()), rtol=0, atol=0)


def test_a_nan_among_cosines_harms_no_other():
    clean, dirty = doubles(0.9, 0.8, 0.7), doubles(0.9, math.nan, 0.7)
    value = log_cap_intersection(64, 11, dirty)
    assert value[1].isnan()
    assert_close(value[[0, 2]], log_cap_intersection(64, 11, clean)[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize(("n", "d"), [(2, 0.6), (3, 1.2), (10, 4.0), (10, 7.5), (64, 20)])
def test_the_slope_of_a_cap_is_the_derivative_to_second_order(n, d):
    cosine = doubles(0.99, 0.7, 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: log_cap_intersection(n, d, c), cosine)
    assert torch.autograd.gradgradcheck(lambda c: log_cap_intersection(n, d, c), cosine)


def test_slopes_at_the_cusp_and_beyond_reach_are_finite():
    cosine = doubles(1.0, 0.5, -1.0).requires_grad_()
    (slope,) = torch.autograd.grad(log_cap_intersection(64, 11, cosine).nan_to_num(neginf=0).sum(), cosine)
    assert bool(slope.isfinite().all())
    assert slope[0] > 1e6
    assert slope[2] == 0
    # (ln I(1) - ln I(c)) / sqrt(1 - c) tends to 3.99: the cusp.
    near = log_cap_intersection(64, 11, doubles(1.0, 1 - 1e-10))
    assert ((near[0] - near[1]) / 1e-5).item() == pytest.approx(3.99, abs=0.01)


def test_caps_work_under_the_transforms_of_torch_func():
    cosine = torch.rand(3, 4, dtype=torch.float64)
    mapped = torch.func.vmap(lambda c: log_cap_intersection(64, 30, c))(cosine)
    assert_close(mapped, log_cap_intersection(64, 30, cosine), rtol=0, atol=0)
    slopes = torch.func.vmap(torch.func.grad(lambda c: log_cap_intersection(64, 30, c)))(cosine[0])
    leaf = cosine[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(log_cap_intersection(64, 30, leaf).sum(), leaf)
    assert_close(slopes, expected)


BAD = [
    (lambda: log_cap_intersection(1, 0, torch.ones(1)), "n must be a whole number of at least 2, got 1"),
    (lambda: log_cap_intersection(8, 9, torch.ones(1)), "d must be a number between 0 and n = 8, got 9"),
    (lambda: log_cap_intersection(8, math.nan, torch.ones(1)), "d must be a number between"),
    (lambda: log_cap_intersection(8, 2, 0.5), "cosine must be a torch.Tensor"),
    (
        lambda: log_cap_intersection(8, 2, torch.ones(1, dtype=torch.long)),
        "cosine must have a floating-point",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_one_line_that_says_what_is_allowed(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
