"""What is read out at an equilibrium: one evaluation carries its gradient and that of the state."""

import pytest
import torch
from problems import F64, normal
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.testing import assert_close

from hopdeq_lwpf import Equilibrium, Termination, fixed_point, retrieve
from hopdeq_lwpf.forgetting import ReLU
from hopdeq_lwpf.models import HopfieldPooling, Retrieval
from hopdeq_lwpf.solvers import Implicit, Neumann, OneStep, Phantom, Unrolled

TIGHT = Termination(rtol=1e-13, atol=1e-15, max_steps=2000)
ADJOINTS = [Implicit(rtol=1e-12), OneStep(), Neumann(6), Phantom(3), Unrolled()]


def inputs():
    return [part.requires_grad_() for part in (normal(4, 3), normal(6, 3, seed=1), normal(6, 2, seed=2))]


def read(adjoint, query, patterns, values, apart, unit=None):
    f = Retrieval(0.7, forgetting=unit, inject="input", inject_weight=0.4)
    x = f.prepare(query, patterns)
    options = {"stop": TIGHT, "adjoint": adjoint, "solver": "picard"}
    if apart:
        weights = f.weights(fixed_point(f, x, query.detach(), **options).value, x)
    else:
        solution = fixed_point(f, x, query.detach(), read_out=True, **options)
        assert solution.value.shape == (4, 6)
        assert solution.state.shape == (4, 3)
        weights = solution.value
    return weights @ values


@pytest.mark.parametrize("unit", [None, ReLU()], ids=repr)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_read_out_is_that_of_an_evaluation_of_its_own(adjoint, unit):
    given = inputs()
    together, apart = (read(adjoint, *given, apart, unit) for apart in (False, True))
    assert_close(together, apart, rtol=1e-13, atol=1e-14)
    slope = normal(4, 2, seed=5)
    assert_close(grad(together, given, slope), grad(apart, given, slope), rtol=1e-9, atol=1e-11)


def test_gradients_to_state_and_read_out_add_up():
    query, patterns, _ = inputs()
    f = Retrieval(0.7, inject="input")

    def losses(query, patterns):
        x = f.prepare(query, patterns)
        solution = fixed_point(f, x, query.detach(), stop=TIGHT, adjoint=ADJOINTS[0], read_out=True)
        return solution.state.square().sum(), solution.value.square().sum()

    first, second = losses(query, patterns)
    parts = [grad(loss, (query, patterns), retain_graph=True) for loss in (first, second)]
    whole = grad(first + second, (query, patterns))
    for one, two, both in zip(*parts, whole, strict=True):
        assert_close(both, one + two, rtol=1e-9, atol=1e-11)


def test_first_and_second_derivatives_of_a_read_out():
    def function(query, patterns, values):
        options = {"stop": TIGHT, "adjoint": ADJOINTS[0], "solver": "picard", "inject": "input"}
        return retrieve(query, patterns, values=values, beta=0.7, **options).value

    assert gradcheck(function, inputs(), fast_mode=True, atol=1e-7)
    assert gradgradcheck(function, inputs(), fast_mode=True, atol=1e-6, rtol=1e-4)


def saved_bytes(work):
    """What autograd keeps for the backward pass, each storage once."""
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    assert result.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("unit", [None, "relu", "pfu"])
def test_a_converged_step_of_training_keeps_what_one_step_keeps(unit):
    query, patterns = normal(64, 16).float(), normal(400, 16, seed=1).float().requires_grad_()
    one, converged = (
        saved_bytes(lambda s=s: retrieve(query, patterns, beta=0.5, forgetting=unit, steps=s).value)
        for s in (1, None)
    )
    assert converged < 1.25 * one


def test_a_converged_layer_keeps_what_one_step_keeps():
    bags = normal(8, 200, 16).float()
    layers = [HopfieldPooling(16, num_heads=4, quantity=8, steps=steps) for steps in (1, None)]
    one, converged = (saved_bytes(lambda layer=layer: layer(bags)) for layer in layers)
    assert converged < 1.25 * one


def test_counted_steps_read_out_in_the_last_application():
    f = Retrieval(2.0)
    query, patterns, _ = inputs()
    x = f.prepare(query, patterns)
    before = fixed_point(f, x, query, steps=2).value
    solution = fixed_point(f, x, query, steps=3, read_out=True)
    assert_close((solution.state, solution.value), f.step(before, x), rtol=0, atol=0)


def test_a_read_out_that_f_does_not_have_is_refused():
    with pytest.raises(TypeError, match="read_out needs f.step"):
        fixed_point(lambda z, x: 0.5 * z, None, torch.ones(2, 3, dtype=F64), read_out=True)


def test_a_layer_hands_out_the_read_out_and_keeps_the_state():
    class Pair(Retrieval):
        def prepare(self, pair):
            return super().prepare(*pair)

    layer = Equilibrium(Pair(2.0))
    pair = (normal(4, 3), normal(6, 3, seed=1))
    weights = layer(pair, read_out=True)
    assert_close(weights.sum(-1), torch.ones(4, dtype=F64))
    assert layer.last_solution.value.shape == (4, 3)


class Reads(nn.Module):
    """f(z, x) = tanh(W z + x), with what `read` makes of z and x beside it."""

    state_ndim = 1

    def __init__(self, read):
        super().__init__()
        self.weight = nn.Parameter(0.3 * normal(3, 3, seed=7))
        self.read = read

    def forward(self, z, x):
        return torch.tanh(z @ self.weight + x)

    def step(self, z, x):
        return self(z, x), self.read(z, x)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_read_out_without_a_gradient_stays_so_and_the_state_keeps_its_own(adjoint):
    x = normal(4, 3)
    for read in (lambda z, x: (z > 0).double(), lambda z, x: 2 * x, lambda z, x: z.detach()):
        f = Reads(read)
        solution = fixed_point(
            f, x, torch.zeros_like(x), solver="picard", stop=TIGHT, adjoint=adjoint, read_out=True
        )
        assert not solution.value.requires_grad
        assert_close(solution.value, read(solution.state, x))
        solution.state.square().sum().backward()
        assert f.weight.grad.abs().max() > 0


def test_several_tensors_cannot_be_read_out():
    x = normal(4, 3)
    with pytest.raises(TypeError, match="must read out one tensor, got tuple"):
        fixed_point(Reads(lambda z, x: (z, z)), x, torch.zeros_like(x), solver="picard", read_out=True)
