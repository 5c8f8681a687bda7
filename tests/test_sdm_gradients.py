"""Smooth memories train, by implicit gradients too; piecewise constant ones refuse in one line."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from hopdeq_lwpf import Termination
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models.sdm.function import SDMFunction
from hopdeq_lwpf.models.sdm.hopfield import ClassicalHopfield
from hopdeq_lwpf.models.sdm.memory import SDM
from hopdeq_lwpf.models.sdm.neurons import Neurons
from hopdeq_lwpf.models.sdm.weights import Attention, Cap, Circle

F64 = torch.float64
TIGHT = Termination(rtol=1e-12, atol=1e-14, max_steps=3000)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


SMOOTH = [
    Attention(4.0),
    Cap(4),
    Cap(2.5),
    Neurons.random(30, 6, activation="exponential", rate=0.5),
    Neurons.random(30, 6, activation="linear"),
]
every_smooth = pytest.mark.parametrize("weights", SMOOTH, ids=repr)


@every_smooth
@pytest.mark.parametrize("unit", [None, PFU(-1.0)], ids=repr)
def test_gradient_of_one_read(weights, unit):
    memory = SDM(weights, space="continuous", steps=1, forgetting=unit)
    query, patterns, pointers = normal(3, 6), normal(5, 6, seed=1), normal(5, 2, seed=2)
    inputs = tuple(t.requires_grad_() for t in (query, patterns, pointers))
    assert gradcheck(lambda *a: memory(*a), inputs)
    assert gradcheck(lambda q, p: memory(q, p), inputs[:2])


@every_smooth
def test_implicit_gradient_equals_the_unrolled_one(weights):
    query, patterns = normal(3, 6), normal(5, 6, seed=1).requires_grad_()
    pointers, seen = normal(5, 2, seed=2).requires_grad_(), normal(3, 2, seed=3)

    def gradients(adjoint):
        memory = SDM(weights, space="continuous", adjoint=adjoint, stop=TIGHT)
        return torch.autograd.grad((memory(query, patterns, pointers) * seen).sum(), (patterns, pointers))

    for implicit, unrolled in zip(gradients("implicit"), gradients("unrolled"), strict=True):
        # 1e-5: the adjoint solves to 1e-6.
        assert_close(implicit, unrolled, rtol=1e-5, atol=1e-5)
        assert unrolled.abs().sum() > 1e-3


def test_beta_is_learned_through_the_fixed_point():
    beta = nn.Parameter(torch.tensor(3.0, dtype=F64))
    memory = SDM(Attention(beta), space="continuous", stop=TIGHT)
    query, patterns = normal(4, 6), normal(5, 6, seed=1)
    (slope,) = torch.autograd.grad(memory(query, patterns).square()[:, 0].sum(), beta)

    def value(b):
        return SDM(Attention(b), space="continuous", stop=TIGHT)(query, patterns).square()[:, 0].sum()

    # A central difference of 1e-4 has an error near 1e-8 times the third derivative.
    assert slope == pytest.approx(float((value(3.0001) - value(2.9999)) / 2e-4), rel=1e-4)
    assert [name for name, _ in memory.named_parameters()] == ["f.weights.beta"]


def test_fitted_attention_can_be_learned():
    weights = Attention.fitted(64, 11, learned=True)
    assert float(weights.beta.detach()) == pytest.approx(14.41160, abs=1e-4)
    out = SDM(weights, space="continuous", steps=1)(normal(3, 64).float(), normal(5, 64, seed=1).float())
    out.sum().backward()
    assert weights.beta.grad is not None


def test_gradient_stays_finite_at_a_stored_pattern_and_beyond_reach():
    # A query on a pattern, where the cap has its cusp, and patterns that it does not reach.
    patterns = torch.eye(8, dtype=F64).requires_grad_()
    out = SDM(Cap(1), space="continuous", steps=1)(patterns[:2].detach().requires_grad_(), patterns)
    (slope,) = torch.autograd.grad(out[:, 0].sum(), patterns)
    assert slope.isfinite().all()


def test_an_empty_read_passes_the_gradient_of_what_it_keeps():
    query = torch.eye(8, dtype=F64)[:1].requires_grad_()
    out = SDM(Cap(1), space="continuous", steps=1)(query, torch.eye(8, dtype=F64)[1:])
    (slope,) = torch.autograd.grad(out[0, 1], query)
    assert_close(slope, torch.eye(8, dtype=F64)[1:2])


def test_pointers_of_a_binary_memory_can_be_learned():
    bits = (normal(5, 12) > 0).to(F64)
    pointers = normal(5, 3).requires_grad_()
    for steps in (None, 1):
        memory = SDM(Circle(5), read_out="identity", steps=steps)
        (slope,) = torch.autograd.grad(memory(bits, bits, pointers).sum(), pointers)
        f = SDMFunction(Circle(5))
        x = f.prepare(bits, bits)
        at = bits if steps else memory.last_solution.state
        assert_close(slope, f.association(at, x).sum(0)[:, None].expand(5, 3))


BITS = (normal(4, 12) > 0).to(F64)
GRAD = BITS.clone().requires_grad_()
REAL = normal(4, 12).requires_grad_()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SDM(Circle(5))(GRAD, BITS),
            r"query requires grad.*thresholds its states.*space='continuous'",
        ),
        (lambda: SDM(Circle(5), steps=2)(BITS, GRAD), r"patterns requires grad, but this memory thresholds"),
        (lambda: SDM(Attention(nn.Parameter(torch.ones(()))))(BITS, BITS), r"beta requires grad"),
        (
            lambda: SDM(Circle(5), space="continuous")(BITS, REAL),
            r"patterns requires grad.*piecewise constant weights Circle\(d=5\)",
        ),
        (lambda: SDM(Cap(5, 99.0), space="continuous")(BITS, REAL), r"piecewise constant weights Cap"),
        (
            lambda: SDM(Neurons.random(9, 12, 4), space="continuous")(BITS, REAL),
            r"piecewise constant weights",
        ),
        (lambda: SDM(Circle(5))(BITS, BITS, GRAD), r"pointers require grad.*read_out='identity'"),
        (lambda: ClassicalHopfield()(GRAD, BITS), r"signs have no gradient.*Attention"),
    ],
)
def test_piecewise_constant_maps_refuse_gradients(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        call()
