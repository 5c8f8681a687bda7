"""HAM and CHN as layers: gradients, forms, batches, dtypes, copies, bad input."""

import copy
import io
import pickle

import pytest
import torch
from hierarchical_networks import F64, TIGHT, inputs, network
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import Result, Termination
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models.ham import CHN, HAM
from hopdeq_lwpf.models.lagrangians import Sigmoid, Softmax, Tanh
from hopdeq_lwpf.solvers import LBFGS, Anderson, Implicit, Unrolled

KINDS = [HAM, CHN]
LAYERS = (5, 6, 4, 3)


def gradients(layer, x):
    """Output, and the gradient of a loss with another slope in every entry to x and every parameter."""
    x = x.clone().requires_grad_()
    out = layer(x)
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum() + out.pow(
        2
    ).sum()
    found = torch.autograd.grad(loss, [x, *layer.parameters()])
    return out.detach(), torch.cat([g.reshape(-1) for g in found])


# --- the output and its gradient


@pytest.mark.parametrize("layers", [(5, 6, 3), (5, 6, 4, 3), (5, 4, 3, 4, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_implicit_gradients_are_those_of_unrolling_in_both_forms(kind, layers):
    layer = network(kind, layers, damping=0.6)
    expected = gradients(network(kind, layers, damping=0.6, solver="picard", adjoint=Unrolled()), inputs())
    for form in (layer, layer.to_even_odd()):
        out, gradient = gradients(form, inputs())
        assert_close(out, expected[0], rtol=0, atol=1e-10)
        # Ten times the tolerance of the adjoint solve, 1e-6 of the incoming gradient.
        assert (gradient - expected[1]).norm() < 1e-5 * expected[1].norm()


@pytest.mark.parametrize("even_odd", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"lagrangian": {1: "softmax", 2: "tanh"}}, {"forgetting": "relu"}, {"forgetting": "pfu"}],
    ids=str,
)
def test_gradients_are_right_by_finite_differences(options, even_odd):
    layer = network(HAM, (4, 5, 3), even_odd=even_odd, adjoint=Implicit("gmres", rtol=1e-12), **options)
    names = [name for name, _ in layer.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in layer.parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (inputs(2, 4).requires_grad_(), *values))


def test_learned_parameters_of_lagrangians_get_their_gradient():
    beta, gain = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (2.0, 3.0))
    layer = network(
        HAM, (4, 5, 3), lagrangian=["sigmoid", Softmax(beta), Sigmoid(gain)], adjoint=Implicit(rtol=1e-12)
    )
    assert {"f.neurons.1.lagrangian.beta", "f.neurons.2.lagrangian.gain"} <= set(
        dict(layer.named_parameters())
    )

    def run(beta, gain):
        names = {"f.neurons.1.lagrangian.beta": beta, "f.neurons.2.lagrangian.gain": gain}
        return torch.func.functional_call(layer, names, (inputs(2, 4),))

    assert torch.autograd.gradcheck(run, (beta, gain))


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_state_of_the_last_layer(kind):
    for form in (network(kind), network(kind, even_odd=True), network(kind, (5, 6, 3), even_odd=True)):
        x = inputs()
        solution = form(x, return_solution=True).require()
        context = form.f.prepare(x)
        assert_close(solution.value, form.f.states(solution.state, context)[-1], rtol=0, atol=1e-11)
        assert solution.value.shape == (3, 3)
        last = form.last_solution
        assert_close(last.value, solution.value)
        assert not last.value.requires_grad
        assert last.state.shape == context.start.shape
        assert form.energy_of(x, last).shape == (3,)


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_are_so_many_iterates_from_zero(steps):
    for form in (network(HAM, steps=steps), network(HAM, steps=steps, even_odd=True)):
        context = form.f.prepare(inputs())
        z = torch.zeros_like(context.start)
        for _ in range(steps - 1):
            z = form.f(z, context)
        assert_close(form(inputs()), form.f.step(z, context)[1])
        assert form.last_solution.steps.tolist() == [steps] * 3
    one = network(HAM, steps=steps)
    reached = not torch.equal(one(inputs()), one(inputs() + 1))
    assert reached == (steps >= 3), "x moves one layer up in a step of the one-matrix form"


@pytest.mark.parametrize("solver", ["picard", Anderson(), "broyden", LBFGS(), "torchdeq:anderson"], ids=str)
def test_every_solver_finds_the_equilibrium(solver):
    stop = Termination(rtol=1e-9, atol=1e-11, max_steps=500)
    for kind in KINDS:
        expected = network(kind, (5, 6, 3), scale=0.7)(inputs())
        for even_odd in (False, True):
            options = {"even_odd": even_odd, "solver": solver, "stop": stop, "scale": 0.7}
            found = network(kind, (5, 6, 3), **options)(inputs())
            assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "adjoint", ["implicit", "neumann", "onestep", "phantom", "unrolled", Implicit("cg")], ids=str
)
def test_every_adjoint_gives_finite_gradients(adjoint):
    for even_odd in (False, True):
        _, gradient = gradients(network(HAM, adjoint=adjoint, even_odd=even_odd), inputs())
        assert gradient.isfinite().all()
        assert gradient.any()


def test_a_start_may_be_given():
    layer = network(HAM, (5, 6, 3))
    first = layer(inputs(), return_solution=True)
    again = layer(inputs(), first.state.detach(), return_solution=True)
    assert (again.steps == 0).all()
    assert_close(again.value, first.value, rtol=0, atol=1e-11)


# --- forms


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_share_their_parameters_and_keys(kind):
    one = network(kind, skips=[(0, 3)])
    other = one.to_even_odd()
    assert other.even_odd
    assert not one.even_odd
    assert [id(p) for p in one.parameters()] == [id(p) for p in other.parameters()]
    keys = ["f.weights.0_1", "f.weights.0_3", "f.weights.1_2", "f.weights.2_3"]
    keys += ["f.biases.1", "f.biases.2", "f.biases.3"]
    assert list(one.state_dict()) == list(other.state_dict()) == keys
    assert type(other) is kind
    back = other.to_one_matrix()
    assert not back.even_odd
    assert_close(back(inputs()), one(inputs()), rtol=0, atol=0)
    with torch.no_grad():
        one.f.weights["0_1"].zero_()
    assert not other.f.weights["0_1"].any()
    fresh = kind(LAYERS, skips=[(0, 3)], even_odd=True).double()
    fresh.load_state_dict(one.state_dict())


def test_first_weights_follow_xavier_and_no_parameter_knows_the_batch():
    torch.manual_seed(0)
    layer = HAM((300, 200, 100))
    for name, shape in (("0_1", (200, 300)), ("1_2", (100, 200))):
        weight = layer.f.weights[name]
        assert weight.shape == shape
        bound = (6 / sum(shape)) ** 0.5
        assert weight.abs().max() <= bound
        assert_close(weight.std().item(), bound / 3**0.5, rtol=0.02, atol=0.0)
    assert_close(layer.f.biases["1"].std().item(), 0.01, rtol=0.2, atol=0.0)


# --- batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"even_odd": True}, {"forgetting": "pfu", "even_odd": True}], ids=str
)
def test_a_batch_is_its_single_problems(kind, options):
    if kind is CHN:
        options = {name: value for name, value in options.items() if name != "forgetting"}
    layer, x = network(kind, **options), inputs(12)
    together = layer(x)
    for row in range(12):
        assert_close(layer(x[row : row + 1]), together[row : row + 1], rtol=0, atol=1e-10)
    nested = layer(x.reshape(3, 2, 2, 5))
    assert nested.shape == (3, 2, 2, 3)
    assert_close(nested.reshape(12, 3), together, rtol=0, atol=1e-10)
    assert layer(x[0]).shape == (3,)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_has_an_empty_output_and_zero_gradients(kind):
    for even_odd in (False, True):
        layer = network(kind, even_odd=even_odd, forgetting="pfu" if kind is HAM else None)
        out = layer(torch.zeros(0, 5, dtype=F64))
        assert out.shape == (0, 3)
        out.sum().backward()
        assert all(not p.grad.any() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_one_row_harms_no_other(kind):
    layer, x = network(kind, on_failure="ignore"), inputs(4)
    expected = layer(x)
    broken = x.clone()
    broken[1] = torch.nan
    found = layer(broken, return_solution=True)
    assert found.result.tolist() == [0, int(Result.NONFINITE), 0, 0]
    others = [0, 2, 3]
    assert_close(found.value[others], expected[others], rtol=0, atol=1e-12)


def test_finished_problems_can_be_dropped():
    f = network(HAM, forgetting=PFU()).f
    x = f.prepare(inputs(10))
    live = torch.tensor([True, False] * 5)
    narrowed, rows = f.select(x, live)
    assert rows.tolist() == [0, 2, 4, 6, 8]
    z = torch.randn(10, f(x.start, x).shape[-1], dtype=F64)
    assert_close(f(z[rows], narrowed), f(z, x)[rows], rtol=0, atol=1e-14)


# --- dtypes and copies


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_near_float64(kind, dtype):
    stop = Termination(rtol=20 * torch.finfo(dtype).eps, max_steps=300)
    exact = network(kind, (5, 6, 3), scale=0.7)(inputs())
    for even_odd in (False, True):
        layer = network(kind, (5, 6, 3), even_odd=even_odd, stop=stop, scale=0.7).to(dtype)
        out = layer(inputs().to(dtype))
        assert out.dtype == dtype
        assert layer.last_solution.residual.dtype == torch.float32
        # The map contracts slowly enough to make a few dozen roundings of the tolerance.
        assert_close(out.double(), exact, rtol=0, atol=200 * torch.finfo(dtype).eps)
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_autocast_keeps_the_state_and_trains():
    for even_odd in (False, True):
        layer = network(HAM, (5, 6, 3), even_odd=even_odd, stop=Termination(rtol=0.02)).float()
        x = inputs().float()
        exact = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.float32
        assert_close(out, exact, rtol=0, atol=0.1)
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_copies_pickles_and_saved_weights_give_the_same_output():
    for kind in KINDS:
        layer = network(kind, lagrangian={1: Tanh(1.5)}, forgetting={1: "relu"} if kind is HAM else None)
        expected = layer(inputs())
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        loaded = kind(LAYERS, lagrangian={1: Tanh(1.5)}, forgetting=layer.f.neurons[1].forgetting, stop=TIGHT)
        loaded.f.neurons[2].forgetting = layer.f.neurons[2].forgetting
        loaded.double().load_state_dict(torch.load(buffer, weights_only=True))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
            assert_close(other(inputs()), expected, rtol=0, atol=0)
            assert {id(p) for p in other.parameters()}.isdisjoint({id(p) for p in layer.parameters()})


def test_functional_transforms_reach_weights_and_inputs():
    layer, x = network(HAM, (4, 5, 3), even_odd=True), inputs(3, 4)
    weights = dict(layer.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    expected = torch.autograd.grad(loss(weights, x), list(weights.values()))
    found = torch.func.grad(loss)({k: v.detach() for k, v in weights.items()}, x)
    for name, gradient in zip(weights, expected, strict=True):
        assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)
    each = torch.func.vmap(layer)(x)
    assert_close(each, layer(x), rtol=0, atol=1e-10)


def test_a_second_derivative_is_right():
    layer = network(HAM, (3, 4, 2), even_odd=True, adjoint=Implicit("gmres", rtol=1e-12))
    assert torch.autograd.gradgradcheck(layer, (inputs(1, 3).requires_grad_(),))


def test_a_layer_compiles_with_one_break():
    layer = network(HAM, (5, 6, 3))
    compiled = torch.compile(layer, backend="eager")
    assert_close(compiled(inputs()), layer(inputs()), rtol=0, atol=0)
