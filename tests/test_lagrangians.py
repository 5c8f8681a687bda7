"""Lagrangians of layers: value, activation, derivative and inverse against slow twins and autograd."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import DTYPES, UNITS
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf.forgetting import PFU, Keep, ReLU, TopK
from hopdeq_lwpf.models.lagrangians import (
    LAGRANGIANS,
    Identity,
    Lagrangian,
    LayerNorm,
    Neurons,
    Rectifier,
    Sigmoid,
    Softmax,
    Sphere,
    Tanh,
    make_lagrangian,
)

F64 = torch.float64


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid_twin(row, gain=4.0, center=0.5):
    rho = [1 / (1 + math.exp(-gain * (s - center))) for s in row]
    return math.fsum(softplus(gain * (s - center)) / gain for s in row), rho


def tanh_twin(row, beta=1.0):
    return math.fsum(math.log(math.cosh(beta * s)) / beta for s in row), [math.tanh(beta * s) for s in row]


def relu_twin(row):
    return math.fsum(0.5 * s * s for s in row if s > 0), [s if s > 0 else 0.0 for s in row]


def identity_twin(row):
    return math.fsum(0.5 * s * s for s in row), list(row)


def softmax_twin(row, beta=1.0):
    top = max(row)
    total = math.fsum(math.exp(beta * (s - top)) for s in row)
    return top + math.log(total) / beta, [math.exp(beta * (s - top)) / total for s in row]


def layernorm_twin(row, eps=1e-5):
    mean = math.fsum(row) / len(row)
    var = math.fsum((s - mean) ** 2 for s in row) / len(row)
    return len(row) * math.sqrt(var + eps), [(s - mean) / math.sqrt(var + eps) for s in row]


def sphere_twin(row):
    norm = math.sqrt(math.fsum(s * s for s in row))
    return norm, [s / norm for s in row]


CASES = {
    "sigmoid": (Sigmoid(), sigmoid_twin),
    "steep sigmoid": (Sigmoid(7.0, -0.2), lambda row: sigmoid_twin(row, 7.0, -0.2)),
    "tanh": (Tanh(), tanh_twin),
    "steep tanh": (Tanh(2.5), lambda row: tanh_twin(row, 2.5)),
    "relu": (Rectifier(), relu_twin),
    "identity": (Identity(), identity_twin),
    "softmax": (Softmax(), softmax_twin),
    "sharp softmax": (Softmax(3.0), lambda row: softmax_twin(row, 3.0)),
    "layernorm": (LayerNorm(), layernorm_twin),
    "sphere": (Sphere(), sphere_twin),
}
OTHERS = {"entmax15": Softmax(2.0, "entmax15"), "softmax1": Softmax(2.0, "softmax1")}
EVERY = {**{name: case[0] for name, case in CASES.items()}, **OTHERS}
STATES = torch.randn(6, 5, dtype=F64, generator=torch.Generator().manual_seed(3)) * 1.5


@pytest.mark.parametrize("name", CASES)
def test_value_and_activation_are_those_of_the_slow_twin(name):
    lagrangian, twin = CASES[name]
    for s, value, rho in zip(STATES, lagrangian.value(STATES), lagrangian.activate(STATES), strict=True):
        expected = twin(s.tolist())
        assert_close(value.item(), expected[0], rtol=1e-12, atol=1e-12)
        assert_close(rho, torch.tensor(expected[1], dtype=F64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_the_activation_is_the_gradient_of_the_value(name):
    s = STATES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(EVERY[name].value(s).sum(), s)
    assert_close(gradient, EVERY[name].activate(STATES), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_the_slope_is_the_derivative_of_the_activation_and_symmetric(name):
    lagrangian = EVERY[name]
    for s in STATES:
        exact = torch.autograd.functional.jacobian(lagrangian.activate, s[None])[0, :, 0, :]
        slope = lagrangian.slope(s.expand(5, 5))
        found = slope(torch.eye(5, dtype=F64))  # one basis vector a row
        assert_close(found, exact, rtol=1e-9, atol=1e-10)
        assert_close(found, found.T, rtol=1e-9, atol=1e-10)
        smallest = torch.linalg.eigvalsh(exact).min()
        assert smallest > -1e-10, "no convex Lagrangian has negative curvature"
        if lagrangian.definite:
            assert smallest > 0


@pytest.mark.parametrize("name", EVERY)
def test_the_slope_can_be_differentiated(name):
    # A CHN has it in the map itself.
    def sloped(s, v):
        return EVERY[name].slope(s)(v)

    s, v = STATES[:2, :3].clone().requires_grad_(), STATES[2:4, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(sloped, (s, v))


@pytest.mark.parametrize("name", ["sigmoid", "steep sigmoid", "tanh", "steep tanh", "identity"])
def test_the_inverse_undoes_the_activation(name):
    lagrangian = EVERY[name]
    # Rounding of an activation near its limits costs 1 / rho' as much of the state, at most 1e4 here.
    assert_close(lagrangian.inverse(lagrangian.activate(STATES)), STATES, rtol=1e-9, atol=1e-9)


def test_an_activation_that_forgets_its_state_has_no_inverse():
    for name in ("relu", "softmax", "layernorm", "sphere"):
        with pytest.raises(TypeError, match="has no inverse"):
            EVERY[name].inverse(STATES)


@pytest.mark.parametrize("name", EVERY)
def test_flags_say_what_the_activation_does(name):
    lagrangian = EVERY[name]
    assert lagrangian.convex
    assert lagrangian.increasing == bool((lagrangian.activate(4 * STATES) >= 0).all())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_kept_and_values_are_wide(name, dtype):
    lagrangian, s = EVERY[name], STATES.to(dtype)
    rho = lagrangian.activate(s)
    assert rho.dtype == dtype
    assert lagrangian.slope(s)(s).dtype == dtype
    assert lagrangian.value(s).dtype == (F64 if dtype == F64 else torch.float32)
    # Some roundings of the dtype: of s times beta, and of the result.
    assert_close(
        rho.double(), lagrangian.activate(s.double()), rtol=0, atol=max(40 * torch.finfo(dtype).eps, 1e-12)
    )


@pytest.mark.parametrize("name", EVERY)
def test_large_states_and_zero_are_finite(name):
    for s in (torch.zeros(1, 4), torch.full((1, 4), 1e4), torch.tensor([[-1e4, 1e4, 3.0, 0.0]])):
        for found in (
            EVERY[name].value(s),
            EVERY[name].activate(s),
            EVERY[name].slope(s)(torch.ones_like(s)),
        ):
            assert found.isfinite().all()


@given(st.floats(-30, 60), st.floats(0.1, 8), st.floats(-2, 2))
def test_softplus_is_exact_far_from_the_centre_too(x, gain, center):
    s = torch.tensor([[x]], dtype=F64)
    expected = softplus(gain * (x - center)) / gain
    assert_close(Sigmoid(gain, center).value(s).item(), expected, rtol=1e-12, atol=1e-300)


def test_a_parameter_is_learned():
    for made, name in (
        (Softmax(nn.Parameter(torch.tensor(2.0))), "beta"),
        (Tanh(nn.Parameter(torch.tensor(2.0))), "beta"),
        (Sigmoid(nn.Parameter(torch.tensor(2.0))), "gain"),
    ):
        assert [key for key, _ in made.named_parameters()] == [name]
        made.activate(torch.randn(2, 3)).square().sum().backward()
        assert getattr(made, name).grad.isfinite()
        assert getattr(made, name).grad != 0


def test_every_name_makes_an_object_of_its_own():
    for name in LAGRANGIANS:
        assert isinstance(make_lagrangian(name), Lagrangian)
        assert make_lagrangian(name) is not make_lagrangian(name)
    given = Tanh(3.0)
    assert make_lagrangian(given) is given


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: make_lagrangian("sigmiod"), ValueError, "lagrangian 'sigmiod' .*Did you mean 'sigmoid'"),
        (lambda: make_lagrangian(3), TypeError, "lagrangian must be a name or a Lagrangian object, got 3"),
        (lambda: make_lagrangian(Tanh), TypeError, r"did you mean Tanh\(...\)"),
        (lambda: Tanh(0.0), ValueError, "beta must be > 0, got 0.0"),
        (lambda: Sigmoid(-1.0), ValueError, "gain must be > 0"),
        (lambda: Sigmoid(1.0, "x"), TypeError, "center must be a number"),
        (lambda: Softmax(math.inf), ValueError, "beta must be finite"),
        (lambda: Softmax(1.0, "lsr"), ValueError, "made for euclidean scores"),
        (lambda: Softmax(1.0, "sofmax"), ValueError, "Did you mean 'softmax'"),
        (lambda: LayerNorm(0.0), ValueError, "eps must be"),
        (lambda: Lagrangian().value(STATES), NotImplementedError, "must override value"),
        (lambda: Lagrangian().activate(STATES), NotImplementedError, "must override activate"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- with forgetting


@pytest.mark.parametrize("unit", UNITS, ids=repr)
@pytest.mark.parametrize("name", ["sigmoid", "softmax", "relu"])
def test_forgetting_puts_the_projection_into_the_lagrangian(unit, name):
    lagrangian, s = EVERY[name], STATES
    layer, threshold = Neurons(lagrangian, unit), unit.draw(STATES)
    value, kept = unit(s, threshold)
    assert_close(layer.value(s, threshold), lagrangian.value(value))
    assert_close(layer.activate(s, threshold), kept * lagrangian.activate(value))
    if not layer.symmetric:
        return
    leaf = s.clone().requires_grad_()
    fixed = None if threshold is None else threshold.detach()
    (gradient,) = torch.autograd.grad(layer.value(leaf, fixed).sum(), leaf)
    assert_close(gradient, layer.activate(s, fixed), rtol=1e-10, atol=1e-10)
    v = STATES.flip(0)
    (pulled,) = torch.autograd.grad(layer.activate(leaf, fixed), leaf, v)
    assert_close(layer.slope(s, fixed)(v), pulled, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_a_layer_that_says_so_has_a_convex_lagrangian(unit):
    for lagrangian in EVERY.values():
        layer = Neurons(lagrangian, unit.eval())
        if not layer.convex:
            continue
        a, b = torch.randn(400, 5, dtype=F64), torch.randn(400, 5, dtype=F64)
        threshold = None
        if unit.draw(a) is not None:
            threshold = (
                torch.zeros((), dtype=F64) if unit.scope == "tensor" else torch.randn(400, 1, dtype=F64)
            )
        # A convex function lies above each of its tangents; distinct scores, as tracked medians need.
        tangent = layer.value(a, threshold) + (layer.activate(a, threshold) * (b - a)).sum(-1)
        assert (layer.value(b, threshold) >= tangent - 1e-9).all()


def test_flags_of_layers_are_honest():
    assert Neurons(Sigmoid(), ReLU()).convex
    assert Neurons(Softmax(), TopK(2)).convex
    assert not Neurons(Tanh(), PFU()).convex, "an activation below 0 is forgotten at a kink that points down"
    assert not Neurons(Sigmoid(), PFU(0.2, -1.0)).convex, "a bias below the threshold: a jump"
    assert Neurons(Sigmoid(), Keep()).definite
    assert not Neurons(Sigmoid(), ReLU()).definite
    assert not Neurons(Softmax(), Keep()).definite
    tangent_fails = Neurons(Tanh(), PFU())
    a, b, t = torch.tensor([[-1.5]]), torch.tensor([[-0.5]]), torch.tensor([[-1.0]])
    tangent = tangent_fails.value(a, t) + (tangent_fails.activate(a, t) * (b - a)).sum(-1)
    assert tangent_fails.value(b, t) < tangent - 0.1


def test_kept_counts_the_neurons_above_the_threshold():
    s = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -2.0, -3.0]])
    assert Neurons(Sigmoid(), ReLU()).kept(s).tolist() == [2, 0]
    assert Neurons(Sigmoid(), Keep()).kept(s) is None
