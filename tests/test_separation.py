"""The separation functions: against slow twins, gradients, masks, extremes; and the energies they make."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import UNITS, exactly, scores_and_mask, separate
from torch.testing import assert_close

from hopdeq_lwpf.forgetting import PFU, Keep, TopK
from hopdeq_lwpf.separation import (
    LSR,
    SEPARATIONS,
    Entmax,
    Entmax15,
    HardMax,
    Polynomial,
    Separation,
    Softmax,
    Softmax1,
    Sparsemax,
    make_separation,
    register_separation,
)

INF = float("inf")
EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
every = pytest.mark.parametrize("name", sorted(SEPARATIONS))
# All but the hard maximum, whose weights jump.
smooth = pytest.mark.parametrize("name", sorted(set(SEPARATIONS) - {"hardmax"}))
# Whose weights sum to 1.
simplex = pytest.mark.parametrize("name", sorted(set(SEPARATIONS) - {"polynomial", "lsr"}))


@every
@given(data=scores_and_mask(), scale=st.sampled_from([0.125, 1.0, 5.0]))
def test_fast_equals_slow(name, data, scale):
    scores, mask = data
    scores = scores * scale
    tolerance = EPS[scores.dtype]
    weights, lagrangian = separate(name, scores, mask)
    separation = SEPARATIONS[name]
    both = separation.weights_and_lagrangian(scores, mask)
    for fast in (both[0], separation.weights(scores, mask)):
        assert fast.dtype == scores.dtype
        assert_close(fast.double(), weights, rtol=tolerance, atol=tolerance)
        if mask is not None:
            assert (fast[mask] == 0).all()
    for fast in (both[1], separation.lagrangian(scores, mask)):
        assert fast.dtype == torch.promote_types(scores.dtype, torch.float32)
        assert_close(fast.double(), lagrangian, rtol=2e-6, atol=2e-6)


@every
@given(data=scores_and_mask())
def test_weights_are_the_gradient_of_the_lagrangian(name, data):
    scores, mask = data[0].double(), data[1]
    tolerance = 0.0 if name == "hardmax" else 1e-12
    scores.requires_grad_()
    separation = SEPARATIONS[name]
    for lagrangian in (
        separation.lagrangian(scores, mask),
        separation.weights_and_lagrangian(scores, mask)[1],
    ):
        (gradient,) = torch.autograd.grad(lagrangian.sum(), scores)
        assert_close(gradient, separation.weights(scores, mask).detach(), rtol=0, atol=tolerance)


@every
@pytest.mark.parametrize("unit", [u for u in UNITS if u.has_energy], ids=repr)
def test_update_is_the_gradient_of_the_energy_with_forgetting(name, unit):
    scores = torch.randn(5, 8, dtype=torch.float64)
    threshold = unit.draw(scores)
    scores = scores.add(0.1 * torch.randn(5, 8, dtype=torch.float64)).requires_grad_()
    value, kept = unit.project(scores, threshold)
    weights, lagrangian = SEPARATIONS[name].weights_and_lagrangian(value)
    (gradient,) = torch.autograd.grad(lagrangian.sum(), scores)
    update = weights if kept is None else kept * weights
    assert_close(update.detach(), gradient, rtol=0, atol=1e-14)


@smooth
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(name, masked):
    scores = (0.6 * torch.randn(4, 6, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(4, 6) < 0.3 if masked else None
    if masked:
        mask[1] = True
    separation = SEPARATIONS[name]
    for function in (
        separation.weights,
        separation.lagrangian,
        lambda s, m: separation.weights_and_lagrangian(s, m),
    ):
        assert torch.autograd.gradcheck(lambda s, f=function: f(s, mask), (scores,))
        assert torch.autograd.gradgradcheck(lambda s, f=function: f(s, mask), (scores,))


def test_sparsemax_jacobian_is_the_centred_support():
    scores = torch.tensor([1.0, 0.8, 0.5, -3.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(Sparsemax().weights, scores)
    support = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    # Martins & Astudillo 2016, eq. 9: diag(s) - s s^T / |S|.
    assert_close(jacobian, torch.diag(support) - torch.outer(support, support) / 3)


def test_sparsemax_of_a_clear_winner():
    scores = torch.tensor([[3.0, 2.0, -5.0], [300.0, 298.9, -1e30]])
    weights, lagrangian = Sparsemax().weights_and_lagrangian(scores)
    exactly(weights, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    exactly(lagrangian, torch.tensor([3.0, 300.0]))
    flat = torch.full((2, 5000), 1e4, dtype=torch.float32)
    assert_close(Sparsemax().weights(flat), torch.full((2, 5000), 2e-4), rtol=1e-4, atol=0)


def test_hardmax_takes_the_first_and_passes_a_zero_gradient():
    scores = torch.tensor([[1.0, 4.0, 4.0, 2.0]], requires_grad=True)
    weights, lagrangian = HardMax().weights_and_lagrangian(scores)
    assert weights.tolist() == [[0, 1, 0, 0]]
    (gradient,) = torch.autograd.grad((weights * torch.randn(1, 4)).sum(), scores)
    assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(lagrangian.sum(), scores)
    assert gradient.tolist() == [[0, 1, 0, 0]]


@simplex
@pytest.mark.parametrize("offset", [-1e4, 1e4, -3e38, 3e37])
def test_extreme_scores(name, offset):
    scores = (torch.tensor([[0.5, -0.25, 0.0]]) + offset).requires_grad_()
    weights, lagrangian = SEPARATIONS[name].weights_and_lagrangian(scores)
    (gradient,) = torch.autograd.grad(lagrangian.sum(), scores, retain_graph=True)
    (again,) = torch.autograd.grad(weights.square().sum(), scores)
    for result in (weights, lagrangian, gradient, again):
        assert result.isfinite().all()
    with torch.no_grad():
        exactly(SEPARATIONS[name].weights_and_lagrangian(scores)[0], weights.detach())
    widened = torch.cat([scores.detach(), torch.ones(1, 1)], -1)
    masked = SEPARATIONS[name].weights(widened, torch.tensor([[False, False, False, True]]))
    exactly(masked, torch.cat([weights.detach(), torch.zeros(1, 1)], -1))
    if name == "softmax1":
        assert_close(weights.sum().item(), 1.0 if offset > 0 else 0.0)
        expected = Softmax().lagrangian(scores) if offset > 0 else torch.zeros(1)
        assert_close(lagrangian, expected)
    else:
        assert_close(weights.sum().item(), 1.0)


def test_softmax_gradient_of_scores_that_differ_by_less_than_their_weights_show():
    scores = torch.tensor([0.0, 1e-30], requires_grad=True)
    _, lagrangian = Softmax().weights_and_lagrangian(scores)
    (gradient,) = torch.autograd.grad(lagrangian, scores)
    assert_close(gradient, torch.tensor([0.5, 0.5]))


def test_softmax1_is_softmax_with_one_more_score_of_zero():
    scores = torch.randn(3, 5, dtype=torch.float64)
    padded = torch.cat([scores, torch.zeros(3, 1, dtype=torch.float64)], -1)
    assert_close(Softmax1().weights(scores), Softmax().weights(padded)[:, :-1])
    assert_close(Softmax1().lagrangian(scores), Softmax().lagrangian(padded))


@every
def test_masked_columns_change_nothing(name):
    separation = SEPARATIONS[name]
    scores = torch.randn(3, 6)
    mask = torch.arange(9) >= 6
    for rubbish in (-INF, INF, float("nan"), 99.0):
        padded = torch.cat([scores, torch.full((3, 3), rubbish)], -1).requires_grad_()
        for shape in ((9,), (1, 9), (3, 9)):
            weights, lagrangian = separation.weights_and_lagrangian(padded, mask.expand(shape))
            assert_close(weights[:, :6], separation.weights(scores))
            assert_close(lagrangian, separation.lagrangian(scores))
            assert (weights[:, 6:] == 0).all()
            (gradient,) = torch.autograd.grad(lagrangian.sum() + weights.square().sum(), padded)
            assert gradient.isfinite().all()
            assert (gradient[:, 6:] == 0).all()


@every
@pytest.mark.parametrize("rubbish", [0.0, -INF, float("nan")])
def test_row_masked_entirely_has_no_weight_and_no_gradient(name, rubbish):
    separation = SEPARATIONS[name]
    scores = torch.randn(2, 3, 5)
    scores[0, 1] = rubbish
    scores.requires_grad_()
    mask = torch.zeros(2, 3, 1, dtype=torch.bool)
    mask[0, 1] = True
    # Anomaly detection objects to a NaN anywhere in the backward pass, also one that is masked later.
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        weights, lagrangian = separation.weights_and_lagrangian(scores, mask)
        assert (weights[0, 1] == 0).all()
        assert lagrangian[0, 1] == 0
        (weights.square().sum() + lagrangian.square().sum()).backward()
    assert (scores.grad[0, 1] == 0).all()
    assert scores.grad.isfinite().all()
    with torch.no_grad():
        plain_weights, plain = separation.weights_and_lagrangian(scores, mask)
        exactly(plain_weights, weights.detach())
        assert_close(plain, lagrangian.detach())


@every
def test_nan_stays_in_its_row_and_is_not_hidden(name):
    scores = torch.randn(3, 5)
    spoilt = scores.clone()
    spoilt[1, 2] = float("nan")
    weights, lagrangian = SEPARATIONS[name].weights_and_lagrangian(spoilt)
    assert weights[1].isnan().any()
    assert lagrangian[1].isnan()
    expected = SEPARATIONS[name].weights_and_lagrangian(scores)
    exactly(weights[[0, 2]], expected[0][[0, 2]])
    exactly(lagrangian[[0, 2]], expected[1][[0, 2]])


@every
def test_autocast_keeps_the_dtype(name):
    with torch.autocast("cpu", torch.bfloat16):
        scores = torch.randn(3, 4) @ torch.randn(4, 6)
        weights, lagrangian = SEPARATIONS[name].weights_and_lagrangian(scores)
        wide = SEPARATIONS[name].weights(scores.double())
    assert scores.dtype == weights.dtype == torch.bfloat16
    assert lagrangian.dtype == torch.float32
    assert wide.dtype == torch.float64
    assert_close(weights.double(), wide, rtol=4e-3, atol=4e-3)


@every
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (5,), (2, 0, 4)])
def test_empty_and_unbatched(name, shape):
    scores = torch.randn(shape)
    for mask in (None, torch.zeros(shape, dtype=torch.bool)):
        weights, lagrangian = SEPARATIONS[name].weights_and_lagrangian(scores, mask)
        assert weights.shape == SEPARATIONS[name].weights(scores, mask).shape == shape
        assert lagrangian.shape == SEPARATIONS[name].lagrangian(scores, mask).shape == shape[:-1]
        assert lagrangian.isfinite().all()


@every
def test_copies_and_repr(name):
    separation = SEPARATIONS[name]
    scores = torch.randn(2, 4)
    for twin in (copy.deepcopy(separation), pickle.loads(pickle.dumps(separation))):
        assert repr(twin) == repr(separation)
        assert repr(separation).startswith(f"{type(separation).__name__}(")
        exactly(twin.weights(scores), separation.weights(scores))


class Half(Separation):
    """L = log(sum exp(2 s)) / 2: softmax at twice the inverse temperature."""

    has_energy = True

    def weights_of(self, logits):
        return torch.softmax(2 * logits, -1)

    def lagrangian_of(self, logits):
        return torch.logsumexp(2 * logits, -1) / 2


def test_a_new_separation_needs_two_methods(monkeypatch):
    monkeypatch.setattr("hopdeq_lwpf.separation.registry.SEPARATIONS", dict(SEPARATIONS))
    register_separation("half", Half())
    assert "half" not in SEPARATIONS
    made = make_separation("half")
    scores, mask = torch.randn(2, 4).half(), torch.tensor([[True] * 4, [False] * 3 + [True]])
    weights, lagrangian = made.weights_and_lagrangian(scores, mask)
    assert weights.dtype == torch.float16
    assert (weights[0] == 0).all()
    assert lagrangian[0] == 0
    assert_close(weights[1, :3], Softmax().weights(2 * scores[1, :3]))
    with pytest.raises(ValueError, match=r"separation 'half' is taken by Half\(\)"):
        register_separation("half", Half())
    with pytest.raises(TypeError, match="needs a name and a Separation instance, got 'third'"):
        register_separation("third", Half)


def test_make_separation():
    kinds = {
        "softmax": Softmax, "sparsemax": Sparsemax, "softmax1": Softmax1, "hardmax": HardMax,
        "entmax15": Entmax15, "entmax": Entmax, "polynomial": Polynomial, "lsr": LSR,
    }  # fmt: skip
    assert {name: type(make_separation(name)) for name in kinds} == kinds
    assert set(SEPARATIONS) == set(kinds)
    own = Half()
    assert make_separation(own) is own
    with pytest.raises(ValueError, match=r"separation 'softmx' is not one of \[.*Did you mean 'softmax'"):
        make_separation("softmx")
    with pytest.raises(TypeError, match=r"separation must be a name .*did you mean Softmax"):
        make_separation(Softmax)
    with pytest.raises(TypeError, match="got None"):
        make_separation(None)


def test_wrong_use_is_named():
    with pytest.raises(TypeError, match=r"mask must be a bool tensor \(True = ignore\), got torch.float32"):
        Softmax().weights(torch.ones(3), torch.zeros(3))
    with pytest.raises(NotImplementedError, match="Separation must override weights_of"):
        Separation().weights(torch.ones(3))
    with pytest.raises(NotImplementedError, match="Separation must override lagrangian_of"):
        Separation().lagrangian(torch.ones(3))
    assert not Separation().has_energy


def largest_rise(unit, separation, runs=30, steps=50):
    """Of |z|^2/2 - L(D(beta X z))/beta along the plain iteration, over random systems."""
    worst = -INF
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(9, 3, generator=generator, dtype=torch.float64)
        z = patterns[seed % 9] + 0.5 * torch.randn(3, generator=generator, dtype=torch.float64)
        beta = (0.25, 1.0, 4.0)[seed % 3]
        threshold, energies = unit.draw(beta * patterns @ z), []
        for _ in range(steps):
            value, kept = unit.project(beta * patterns @ z, threshold)
            weights, lagrangian = separation.weights_and_lagrangian(value)
            energies.append(0.5 * z @ z - lagrangian / beta)
            z = patterns.T @ (weights if kept is None else kept * weights)
        worst = max(worst, torch.stack(energies).diff().max().item())
    return worst


@pytest.mark.parametrize("name", sorted(set(SEPARATIONS) - {"lsr"}))
@pytest.mark.parametrize("unit", [u for u in UNITS if u.has_energy], ids=repr)
def test_energy_never_rises_where_promised(name, unit):
    assert SEPARATIONS[name].has_energy
    assert largest_rise(unit, SEPARATIONS[name], runs=12) < 1e-12


@pytest.mark.parametrize(
    "unit", [PFU(tracked=True), TopK(3, "threshold"), PFU(0.5, -5.0), PFU(bias=0.0)], ids=repr
)
def test_energy_does_rise_where_nothing_is_promised(unit):
    assert not unit.has_energy
    assert largest_rise(unit, Softmax(), runs=150, steps=20) > 1e-3


# torch itself uses torch.jit.script where it loads its forward-mode rules.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@every
@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_transforms_agree_also_at_the_threshold(name, unit):
    # Frozen at the scores themselves, so that one of them lies on its median.
    scores = torch.randn(3, 7, dtype=torch.float64)
    threshold = unit.draw(scores)
    shared = threshold is None or threshold.ndim == 0

    def update(row, limit):
        value, kept = unit.project(row, limit)
        weights = SEPARATIONS[name].weights(value)
        return weights if kept is None else kept * weights

    def rows(transform):
        return torch.func.vmap(transform(update), in_dims=(0, None if shared else 0))(scores, threshold)

    if getattr(unit, "scope", "row") == "row" or not getattr(unit, "tracked", False):
        exactly(rows(lambda f: f), update(scores, threshold))
    assert_close(rows(torch.func.jacfwd), rows(torch.func.jacrev), rtol=0, atol=1e-14)


def test_lagrangian_of_one_score_without_forgetting():
    assert Keep().has_energy
    one = torch.tensor([[0.75]])
    expected = dict.fromkeys(SEPARATIONS, 0.75) | {
        "softmax1": math.log1p(math.exp(0.75)), "polynomial": 0.75**2 / 2, "lsr": math.log(1.75)
    }  # fmt: skip
    for name, value in expected.items():
        assert SEPARATIONS[name].lagrangian(one).item() == pytest.approx(value)


@pytest.mark.parametrize("scale", [1.0, 1e19, 1e30])
def test_the_gradient_of_logsumexp_is_softmax_whatever_the_scale(scale):
    scores = torch.tensor([scale, scale, -scale, scale], requires_grad=True)
    (g,) = torch.autograd.grad(make_separation("softmax").lagrangian(scores), scores)
    assert_close(g, torch.softmax(scores.detach(), -1))
