"""Polynomial and LSR: degrees, the density without support, the energy of the mean shift, settings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import UNITS, exactly, lsr_row, polynomial_row, rowwise
from torch.testing import assert_close

from hopdeq_lwpf.separation import LSR, Polynomial, Softmax

F64 = torch.float64


@pytest.mark.parametrize("degree", [2, 2.5, 3, 10])
def test_polynomial_of_any_degree_equals_the_slow_twin(degree):
    scores = 2 * torch.randn(4, 7, dtype=F64)
    weights, lagrangian = Polynomial(degree).weights_and_lagrangian(scores)
    pairs = rowwise(lambda row, _: polynomial_row(row, degree), scores, None)
    assert_close(weights, torch.tensor([p for p, _ in pairs], dtype=F64))
    assert_close(lagrangian, torch.tensor([value for _, value in pairs], dtype=F64))


@pytest.mark.parametrize("degree", [2, 2.5, 3])
def test_polynomial_has_finite_gradients_where_the_scores_are_zero_or_below(degree):
    scores = torch.tensor([[0.0, -1.0, 2.0]], dtype=F64, requires_grad=True)
    weights = Polynomial(degree).weights(scores)
    (first,) = torch.autograd.grad(weights.sum(), scores, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), scores)
    for gradient in (first, second):
        assert (gradient[0, :2] == 0).all()
        assert gradient.isfinite().all()


@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=12), st.sampled_from([0.0, 1e-3, 1.0]), st.booleans()
)
def test_lsr_equals_the_slow_twin(halves, eps, double):
    scores = torch.tensor(halves, dtype=F64 if double else torch.float32) / 2
    weights, lagrangian = LSR(eps).weights_and_lagrangian(scores)
    slow_weights, slow_lagrangian = lsr_row(scores.tolist(), eps)
    tolerance = 1e-12 if double else 1e-6
    assert_close(weights.double(), torch.tensor(slow_weights, dtype=F64), rtol=tolerance, atol=tolerance)
    assert_close(
        lagrangian.double(), torch.tensor(slow_lagrangian, dtype=F64), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_lsr_where_nothing_is_active(eps):
    scores = torch.tensor([[-5.0, -1.0], [0.0, -0.5]], dtype=F64, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        weights, lagrangian = LSR(eps).weights_and_lagrangian(scores)
        (gradient,) = torch.autograd.grad(lagrangian.sum() + weights.square().sum(), scores)
    exactly(weights[0].detach(), torch.zeros(2, dtype=F64))
    exactly(gradient[0], torch.zeros(2, dtype=F64))
    assert lagrangian[0].item() == (pytest.approx(math.log(eps)) if eps else -math.inf)
    assert (weights[1] > 0).all()


@pytest.mark.parametrize("unit", [u for u in UNITS if u.has_energy], ids=repr)
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_mean_shift_never_raises_the_energy_of_lsr(unit, eps):
    separation, worst, active = LSR(eps), -math.inf, 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(9, 3, generator=generator, dtype=F64)
        z = patterns[seed % 9] + 0.3 * torch.randn(3, generator=generator, dtype=F64)
        beta = (0.1, 0.3, 1.0)[seed % 3]
        threshold, energies = None, []
        for _ in range(30):
            scores = -0.5 * beta * (patterns - z).square().sum(-1)
            threshold = unit.draw(scores) if threshold is None else threshold
            value, kept = unit.project(scores, threshold)
            weights, lagrangian = separation.weights_and_lagrangian(value)
            held = weights if kept is None else kept * weights
            energies.append(-lagrangian / beta)
            if held.sum() == 0:
                break
            active += 1
            z = held @ patterns / held.sum()
        if len(energies) > 1:
            worst = max(worst, torch.stack(energies).diff().max().item())
    assert separation.has_energy
    # Some units forget every euclidean score, none of which is above 0.
    assert active or unit.project(torch.zeros(1, dtype=F64), threshold)[1].item() == 0
    assert worst < 1e-12


def test_lsr_is_made_for_the_euclidean_similarity_and_the_others_for_the_dot_product():
    assert LSR.similarity == "euclidean"
    assert Softmax.similarity == Polynomial.similarity == "dot"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Polynomial(1.5), ValueError, "degree must be >= 2, got 1.5"),
        (lambda: Polynomial(math.inf), ValueError, "degree must be finite"),
        (lambda: Polynomial("3"), TypeError, "degree must be a number, got '3'"),
        (lambda: LSR(-0.1), ValueError, "eps must be >= 0, got -0.1"),
        (lambda: LSR(True), TypeError, "eps must be a number, got True"),
    ],
)
def test_wrong_settings_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_repr_shows_the_settings():
    assert repr(Polynomial(3)) == "Polynomial(degree=3)"
    assert repr(LSR()) == "LSR(eps=0.0)"
