"""The fitted inverse temperatures against plain sums and recorded values, both estimators."""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hopdeq_lwpf.models.sdm.betas import BetaFit, fit_beta
from hopdeq_lwpf.models.sdm.caps import log_cap_intersection
from hopdeq_lwpf.models.sdm.intersections import log_circle_intersection
from tests.references_sdm import line, log_share, recorded, shared, softmax_error


def name(case: dict) -> str:
    return case["id"]


def circle_line(n: int, d: int, distances: range) -> tuple[float, float, float]:
    cosine = [1 - 2 * dv / n for dv in distances]
    return line(cosine, [log_share(shared(n, d, dv), n) for dv in distances])


@st.composite
def radii(draw):
    n = draw(st.integers(3, 80))
    return n, draw(st.integers(2, n // 2 + 1))


@given(radii())
def test_the_line_is_least_squares_through_the_counts(problem):
    n, d = problem
    fit = fit_beta(n, d)
    slope, bias, r2 = circle_line(n, d, range(d))
    assert fit.beta == pytest.approx(slope, rel=1e-9)
    assert fit.bias == pytest.approx(bias, rel=1e-9)
    assert fit.r2 == pytest.approx(r2, abs=1e-9)


@given(radii())
def test_the_published_slope_is_larger_by_one_point(problem):
    n, d = problem
    ols, published = fit_beta(n, d), fit_beta(n, d, estimator="published")
    assert published.beta == pytest.approx(ols.beta * d / (d - 1), rel=1e-12)
    # Its bias leads the steeper line through the same middle; least squares fits better than any other line.
    middle = 1 - (d - 1) / n
    assert published.beta * middle + published.bias == pytest.approx(ols.beta * middle + ols.bias, rel=1e-9)
    assert published.r2 <= ols.r2


@pytest.mark.parametrize("case", recorded("fit_beta (binary), AS PUBLISHED"), ids=name)
def test_binary_betas_as_published(case):
    where = case["inputs"]
    fit = fit_beta(where["n"], where["d"], estimator="published")
    assert fit.beta == pytest.approx(case["value"], rel=case["rtol"])


@pytest.mark.parametrize("case", recorded("fit_beta (binary), TRUE"), ids=name)
def test_binary_betas_by_true_least_squares(case):
    fit = fit_beta(case["inputs"]["n"], case["inputs"]["d"])
    assert fit.beta == pytest.approx(case["value"], rel=case["rtol"])
    assert fit.r2 == pytest.approx(case["r_squared"], abs=1e-9)


@pytest.mark.parametrize("case", recorded("fit_beta (continuous"), ids=name)
def test_cap_betas_by_both_estimators(case):
    n, d = case["inputs"]["n"], case["inputs"]["d"]
    published = fit_beta(n, d, space="continuous", estimator="published")
    assert published.beta == pytest.approx(case["value"], rel=case["rtol"])
    fit = fit_beta(n, d, space="continuous")
    # Recorded from the authors' quadrature, which drifts by up to 3e-4 in the logarithm.
    assert fit.beta == pytest.approx(case["least_squares_value"], rel=case["rtol"])


@pytest.mark.parametrize("case", recorded("learned beta vs"), ids=name)
def test_the_betas_of_the_figure_leave_distance_0_out(case):
    n, d = case["inputs"]["n"], case["inputs"]["d"]
    published = fit_beta(n, d, estimator="published", distances=range(1, d + 1))
    assert published.beta == pytest.approx(case["value"], rel=case["rtol"])
    fit = fit_beta(n, d, distances=range(1, d + 1))
    assert fit.beta == pytest.approx(case["least_squares_value"], rel=case["rtol"])


def test_the_tiny_recorded_beta():
    (case,) = recorded("tiny_beta")
    n, d = case["inputs"]["n"], case["inputs"]["d"]
    assert fit_beta(n, d).beta == pytest.approx(case["value"]["ols"], rel=case["rtol"])
    published = fit_beta(n, d, estimator="published").beta
    assert published == pytest.approx(case["value"]["as_published"], rel=case["rtol"])


@pytest.mark.parametrize("case", recorded("beta minimising"), ids=name)
def test_softmax_betas_reach_the_recorded_optimum(case):
    n, d = case["inputs"]["n"], case["inputs"]["d"]
    fit = fit_beta(n, d, fit="softmax")
    assert fit.beta == pytest.approx(case["value"], rel=case["rtol"])
    counts = [shared(n, d, dv) for dv in range(n + 1)]
    assert softmax_error(fit.beta, n, counts) == pytest.approx(case["mse"], rel=1e-8)


@pytest.mark.parametrize(("n", "d"), [(20, 4), (33, 16), (64, 11), (100, 45), (100, 60)])
def test_no_other_beta_has_a_smaller_softmax_error(n, d):
    fit = fit_beta(n, d, fit="softmax")
    counts = [shared(n, d, dv) for dv in range(n + 1)]
    least = softmax_error(fit.beta, n, counts)
    for k in range(-200, 201):
        assert softmax_error(fit.beta * 1.02**k, n, counts) >= least
    share = [count / sum(counts) for count in counts]
    spread = math.fsum((one - 1 / (n + 1)) ** 2 for one in share)
    assert fit.r2 == pytest.approx(1 - least * (n + 1) / spread, rel=1e-9)
    # The bias gives the fitted curve the sum of the intersection.
    total = math.fsum(math.exp(fit.beta * (1 - 2 * dv / n) + fit.bias) for dv in range(n + 1))
    assert total == pytest.approx(sum(counts) / 2**n, rel=1e-9)


def test_where_every_address_is_shared_beta_is_zero():
    assert fit_beta(64, 64, fit="softmax") == BetaFit(0.0, 0.0, 1.0)
    assert fit_beta(64, 64) == BetaFit(0.0, 0.0, 1.0)


@given(radii())
def test_distances_may_be_a_range_a_list_or_a_tensor(problem):
    n, d = problem
    assume(d >= 4)  # distances 1 and 2 alone share one intersection
    wanted = list(range(1, d))
    fits = [fit_beta(n, d, distances=kind) for kind in (range(1, d), wanted, torch.tensor(wanted))]
    assert fits[0] == fits[1] == fits[2]
    assert fits[0].beta == pytest.approx(circle_line(n, d, range(1, d))[0], rel=1e-9)


def test_the_cap_line_is_least_squares_through_the_caps():
    cosine = [1 - 2 * dv / 40 for dv in range(12)]
    log_shares = log_cap_intersection(40, 12, torch.tensor(cosine, dtype=torch.float64)).tolist()
    fit = fit_beta(40, 12, space="continuous")
    assert (fit.beta, fit.bias, fit.r2) == pytest.approx(line(cosine, log_shares), rel=1e-9)
    softened = fit_beta(40, 12, space="continuous", fit="softmax")
    assert 0 < softened.beta < 1000


def test_a_fit_is_frozen_and_its_line_is_near_the_intersection():
    fit = fit_beta(1000, 451)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.beta = 1.0
    table = log_circle_intersection(1000, 451)[:451]
    cosine = 1 - 2 * torch.arange(451, dtype=torch.float64) / 1000
    left = (table - fit.beta * cosine - fit.bias).square().sum() / (table - table.mean()).square().sum()
    assert fit.r2 == pytest.approx(1 - left.item(), rel=1e-9)
    assert fit.r2 > 0.99


BAD = [
    (lambda: fit_beta(64, 65), "d must be a whole number of at least 0 and at most 64, got 65"),
    (lambda: fit_beta(64, 1), "distances must hold at least two different ones.*needs d >= 2"),
    (lambda: fit_beta(1, 1, space="continuous"), "n must be a whole number of at least 2"),
    (lambda: fit_beta(64, 11, space="binry"), "space 'binry' is not one of.*Did you mean 'binary'"),
    (lambda: fit_beta(64, 11, estimator="OLS"), "Did you mean 'ols'"),
    (lambda: fit_beta(64, 11, fit="softmx"), "Did you mean 'softmax'"),
    (lambda: fit_beta(64, 11, fit="softmax", estimator="published"), "estimator 'published' is one of fit"),
    (lambda: fit_beta(64, 11, distances=[3, 3]), "at least two different ones, got"),
    (lambda: fit_beta(64, 11, distances=[3, 65]), "distances must be a whole number.*at most 64, got 65"),
    (lambda: fit_beta(64, 11, distances=[3, 30]), "lie beyond the reach 2 d = 22"),
    (lambda: fit_beta(64, 0, fit="softmax"), "no finite beta"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_one_line_that_says_what_is_allowed(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
