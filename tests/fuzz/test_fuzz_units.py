"""Forgetting units, separation functions and normalisations on their own, forward and backward."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz.profiles import examples, within
from fuzz.strategies import DTYPES, masks, separations_by_name, tensors, units_by_name
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.normalization import LayerNorm, Sphere
from hopdeq_lwpf.separation import LSR, Entmax, HardMax, Polynomial, Softmax1, make_separation

SHAPES = st.tuples(st.integers(0, 3), st.integers(0, 9)) | st.just((5,)) | st.just((2, 1, 3))
KINDS = ("moderate", "extreme", "any")
UNITS, FUNCTIONS = units_by_name(), separations_by_name()


@st.composite
def scored(draw, kinds=KINDS):
    """Scores and a mask or None."""
    shape = draw(SHAPES)
    scores = draw(tensors(shape, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(kinds))))
    return scores, draw(st.none() | masks(shape) | masks(shape[-1:]))


@pytest.mark.parametrize("name", UNITS)
@examples(25)
@given(scored(), st.booleans(), st.data())
def test_a_unit_keeps_or_forgets_every_score(name, scored, training, data):
    scores, mask = scored
    unit = data.draw(UNITS[name]).train(training)
    with within():
        value, kept = unit(scores, mask=mask)
        weights = kept * torch.softmax(value, -1)
    given_up = scores == -math.inf if mask is None else mask.expand(scores.shape)
    assert value.shape == kept.shape == scores.shape
    assert value.dtype == kept.dtype == scores.dtype
    # The softmax of an infinite score, and of nothing but -inf, is NaN with or without a unit.
    sound = ~((scores.isnan() | (scores == math.inf)) & ~given_up).any(-1)
    sound = sound & ~((scores == -math.inf) & ~given_up).any(-1)
    if scores.dtype is not torch.float16:  # the difference of two scores may be too large for the dtype
        sound = sound & ~((scores.abs() > torch.finfo(scores.dtype).max / 4) & ~given_up).any(-1)
    if getattr(unit, "scope", "row") == "tensor":
        sound = sound & sound.all()
    assert ((kept == 0) | (kept == 1))[sound].all()
    assert not kept[given_up].any()
    assert not value[sound].isnan().any()
    assert not weights[sound].isnan().any()
    inside = sound.unsqueeze(-1) & (kept == 1) & (scores > torch.finfo(scores.dtype).min / 2)
    assert torch.equal(value[inside], scores[inside])
    if isinstance(unit, TopK):
        assert torch.equal(kept.sum(-1)[sound], (~given_up).sum(-1).clamp(max=unit.k).to(kept)[sound])


@pytest.mark.parametrize("name", UNITS)
@examples(10)
@given(scored(("moderate", "extreme")), st.data())
def test_the_gradient_of_a_unit_is_finite(name, scored, data):
    scores, mask = scored
    scores.requires_grad_()
    unit = data.draw(UNITS[name]).eval()
    with within():
        value, kept = unit(scores, mask=mask)
        (kept * torch.softmax(value, -1)).sum().backward()
    if scores.numel():
        assert scores.grad.isfinite().all()
        if mask is not None:
            assert not scores.grad[mask.expand(scores.shape)].any()


@pytest.mark.parametrize("name", FUNCTIONS)
@examples(12)
@given(scored(), st.data())
def test_weights_and_lagrangian_are_numbers_wherever_the_scores_are(name, scored, data):
    scores, mask = scored
    separation = make_separation(data.draw(FUNCTIONS[name]))
    with within():
        weights, lagrangian = separation.weights_and_lagrangian(scores, mask)
    assert weights.shape == scores.shape
    assert weights.dtype == scores.dtype
    assert lagrangian.shape == scores.shape[:-1]
    out = torch.zeros_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
    if not scores.shape[-1]:
        return
    sound = (scores.isfinite() | out).all(-1)
    assert not weights[out & sound.unsqueeze(-1)].any()
    sound = sound & ~out.all(-1)
    weights, lagrangian = weights[sound], lagrangian[sound]
    assert not weights.isnan().any()
    assert (weights >= 0).all()
    assert not lagrangian.isnan().any()
    if not isinstance(separation, (Polynomial, LSR)):
        assert lagrangian.isfinite().all()
        total = weights.double().sum(-1)
        slack = 4 * scores.shape[-1] * torch.finfo(scores.dtype).eps
        assert (total <= 1 + slack).all()
        assert isinstance(separation, Softmax1) or (total >= 1 - slack).all()


@pytest.mark.parametrize("name", FUNCTIONS)
@examples(8)
@given(scored(("moderate", "extreme")), st.data())
def test_the_gradient_of_a_lagrangian_is_the_weights(name, scored, data):
    scores, mask = scored
    separation = make_separation(data.draw(FUNCTIONS[name]))
    scores.requires_grad_()
    with within():
        weights, lagrangian = separation.weights_and_lagrangian(scores, mask)
        lagrangian.sum().backward(retain_graph=True)
        (slope,) = torch.autograd.grad(weights.double().square().sum(), scores, allow_unused=True)
    if not scores.numel():
        return
    big = isinstance(separation, Polynomial) and not (scores.abs() < 1e3).all()
    if not big:
        # One rounding of the dtype of the scores, which the gradient has, and some of the sums.
        eps = 64 * torch.finfo(scores.dtype).eps
        assert torch.allclose(scores.grad.double(), weights.double(), rtol=eps, atol=eps)
        # Above alpha = 2 the slope of a weight p is p^(2 - alpha), without bound.
        steep = isinstance(separation, Entmax) and separation.alpha > 2
        assert slope is None or steep or slope.isfinite().all()


@examples(15)
@given(st.sampled_from(DTYPES), st.sampled_from(KINDS), st.data())
def test_a_normalised_state_lies_where_its_conjugate_is_finite(dtype, kind, data):
    a = data.draw(tensors((3, data.draw(st.integers(1, 5))), dtype, kind)).requires_grad_()
    for normalization in (Sphere(), LayerNorm(), LayerNorm(eps=1e-30)):
        with within():
            g = normalization.apply(a)
            conjugate = normalization.conjugate(g)
        moderate = (a.abs() < 1e15).all(-1)
        assert g[moderate].isfinite().all()
        assert conjugate[moderate].isfinite().all()
        if kind == "moderate":
            (slope,) = torch.autograd.grad(g.double().square().sum(), a)
            assert slope.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_hardmax_passes_nan_on_in_its_row_only(dtype):
    scores = torch.tensor([[1.0, math.nan, 2.0], [3.0, 1.0, 2.0]], dtype=dtype)
    weights = HardMax().weights(scores)
    assert weights[0].isnan().any()
    assert weights[1].tolist() == [1.0, 0.0, 0.0]


def test_layer_normalisation_with_a_tiny_eps_has_a_gradient():
    a = torch.ones(2, 1, requires_grad=True)  # float32, where the derivative of 1 / sqrt(1e-30) overflows
    (slope,) = torch.autograd.grad(LayerNorm(eps=1e-30).apply(a).sum(), a)
    assert not slope.any()


@pytest.mark.parametrize("unit", [TopK(2, bias="threshold"), PFU(-3e4, -3e4), ReLU(min_keep=1)], ids=repr)
def test_large_scores_in_half_precision_are_kept_as_they_are(unit):
    scores = torch.tensor([60000.0, 40000.0], dtype=torch.float16)
    value, kept = unit(scores)
    assert value.tolist() == scores.tolist()
    assert kept.tolist() == [1.0, 1.0]
