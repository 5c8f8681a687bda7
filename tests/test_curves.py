"""Patterns on a curve: geometry, noise, seeds."""

import math

import pytest
import torch
from torch.testing import assert_close

from hopdeq_lwpf.data import CURVES, load_digits, make_curve


@pytest.mark.parametrize("curve", CURVES)
def test_points_lie_on_one_closed_curve_of_mean_square_length_one(curve):
    points = make_curve(curve, stored=4000, queries=500, stored_noise=0.0, query_noise=0.0)
    assert points.stored.shape == (4000, 64)
    # 4,000 angles drawn at random: the mean of their squares scatters by a per cent or two.
    assert float(points.stored.square().sum(1).mean()) == pytest.approx(1.0, abs=0.05)
    assert float(points.stored.mean(0).norm()) < 0.05
    assert bool((points.stored_angle.diff() >= 0).all())
    assert 0 <= float(points.stored_angle[0]) <= float(points.stored_angle[-1]) < 2 * math.pi
    # Closed and without jumps: neighbours on the curve are near, also across the angle 0.
    steps = (points.stored.roll(-1, 0) - points.stored).norm(dim=1)
    assert float(steps.max()) < 0.2
    assert_close(points.query, points.target)


@pytest.mark.parametrize("curve", CURVES)
def test_noise_has_the_length_it_is_given(curve):
    points = make_curve(curve, queries=3000, query_noise=0.7)
    assert float((points.query - points.target).square().sum(1).mean().sqrt()) == pytest.approx(0.7, rel=0.02)


def test_a_digit_that_is_turned_by_nothing_is_the_digit():
    points = make_curve("rotated_digit", queries=720, query_noise=0.0, seed=3)
    first = points.target[points.query_angle.argmin()]
    pictures = load_digits()[0]
    centred = pictures - pictures.mean(1, keepdim=True)
    found = torch.nn.functional.cosine_similarity(centred, (first - first.mean())[None], dim=1)
    assert float(found.max()) > 0.9


def test_what_is_drawn_depends_on_the_seed_alone_and_noise_not_on_its_strength():
    one, same, other = (make_curve(seed=seed) for seed in (1, 1, 2))
    assert_close(one.stored, same.stored)
    assert not torch.allclose(one.stored, other.stored)
    weak, strong = (make_curve(query_noise=noise) for noise in (0.1, 0.2))
    assert_close(2 * (weak.query - weak.target), strong.query - strong.target, rtol=1e-4, atol=1e-5)
    assert_close(weak.stored, strong.stored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curve": "spiral"}, "is not one of"),
        ({"stored": 0}, "stored must be at least 1"),
        ({"query_noise": -1.0}, "query_noise must be finite and at least 0"),
        ({"waves": 1.5}, "waves must be a whole number"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_settings_that_make_no_sense_are_errors(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_curve(**options)
