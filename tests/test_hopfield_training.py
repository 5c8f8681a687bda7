"""Hopfield layers in training: gradients, dead heads, dtypes, compilation, memory of one step."""

import warnings

import pytest
import torch
from references import exactly
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import Termination
from hopdeq_lwpf.forgetting import PFU, ReLU
from hopdeq_lwpf.models import Hopfield, HopfieldLayer, HopfieldPooling
from hopdeq_lwpf.separation import SEPARATIONS

F64 = torch.float64
B, L, W = 2, 3, 4
TIGHT = Termination(rtol=1e-13, atol=1e-14, max_steps=2000)
UNITS = [None, ReLU(min_keep=1), PFU(), PFU(tracked=True, bias=0.0)]


def made(kind=Hopfield, **options):
    """A layer in float64 whose scores are of order one, and whose solve is tight."""
    layer = kind(W, num_heads=2, stop=TIGHT, **options).double()
    with torch.no_grad():
        for name, part in layer.named_parameters():
            if part.ndim > 1:
                part.copy_(0.6 * torch.randn_like(part))
            elif "norm" not in name and "beta" not in name:
                part.copy_(0.3 * torch.randn_like(part))
    return layer


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_gradients_of_input_and_parameters(unit, steps):
    layer = made(steps=steps, forgetting=unit, inject="input", learn_beta=True, concat_bias_pattern=True)
    x = torch.randn(B, L, W, dtype=F64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    assert any("beta" in name for name in names)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    parameters = [part.detach().clone().requires_grad_() for _, part in layer.named_parameters()]
    torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("separation", ["sparsemax", "entmax15", "softmax1", "lsr"])
def test_gradients_with_other_separations(separation):
    assert separation in SEPARATIONS
    for steps in (1, None):
        layer = made(steps=steps, separation=separation, inject="input", beta=0.2)
        x = torch.randn(B, L, W, dtype=F64, requires_grad=True)
        torch.autograd.gradcheck(layer, x, fast_mode=True)


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_the_gradient_of_an_equilibrium_is_that_of_many_steps(unit):
    layer = made(steps=None, forgetting=unit, inject="input")
    x = torch.randn(B, L, W, dtype=F64)
    parameters = list(layer.parameters())
    want = []
    for steps in (None, 400):
        layer.steps = steps
        want.append(torch.autograd.grad(layer(x).square().sum(), parameters))
    for solved, unrolled in zip(*want, strict=True):
        assert_close(solved, unrolled, rtol=1e-6, atol=1e-9)


def test_second_derivatives_of_an_equilibrium():
    layer = made(steps=None, inject="input")
    x = torch.randn(1, 2, W, dtype=F64, requires_grad=True)
    torch.autograd.gradgradcheck(layer, x, fast_mode=True)


def test_other_solvers_and_adjoints_give_the_same_equilibrium():
    x = torch.randn(B, L, W, dtype=F64)
    want = made(steps=None, inject="input")
    gradients = torch.autograd.grad(want(x).square().sum(), list(want.parameters()))
    for options in (
        {"solver": "picard"},
        {"solver": "anderson"},
        {"adjoint": "unrolled", "solver": "picard"},
    ):
        layer = made(steps=None, inject="input", **options)
        layer.load_state_dict(want.state_dict())
        out = layer(x)
        assert_close(out, want(x), rtol=1e-8, atol=1e-9)
        ours = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        for a, b in zip(ours, gradients, strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_state_that_only_starts_a_solve_is_detached_and_said_to_be():
    layer = made(steps=None)
    with pytest.warns(UserWarning, match="z0 was detached"):
        layer(torch.randn(B, L, W, dtype=F64)).sum().backward()
    assert "detached" in layer.last_solution.note
    assert layer.state_projection.weight.grad is None
    assert layer.stored_projection.weight.grad.abs().max() > 0


def bags(seed: int) -> torch.Tensor:
    """Bags of positive features, as a ReLU or SELU network makes them: (4 bags, 8 instances, 6)."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + 0.2 * torch.rand(4, 8, 6, generator=generator)


def pooling(seed: int, unit: object) -> HopfieldPooling:
    """Single-query pooling of raw features, where the sign of all scores is one draw of the weights."""
    torch.manual_seed(seed)
    plain = {f"normalize_{name}": False for name in ("stored_pattern", "state_pattern", "pattern_projection")}
    return HopfieldPooling(6, forgetting=unit, **plain)


def test_dead_starts_are_reported_and_min_keep_avoids_every_one_of_them():
    dead = 0
    for seed in range(200):
        layer, x = pooling(seed, "relu"), bags(seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(x).square().sum().backward()
        gradient = layer.pooling_weights.grad.abs().max()
        said = [str(warning.message) for warning in caught]
        assert (gradient == 0) == bool(said), seed
        assert all("min_keep=1" in message and "1 of 1 heads" in message for message in said)
        dead += bool(said)
        kept = pooling(seed, ReLU(min_keep=1))
        kept(x).square().sum().backward()  # a warning would be an error
        assert kept.pooling_weights.grad.abs().max() > 0, seed
    # Each start is a coin toss about the sign of all scores.
    assert 60 < dead < 140


def test_dead_heads_are_looked_for_once_and_in_training_alone():
    layer = pooling(next(seed for seed in range(20) if is_dead(seed)), "relu")
    x = bags(0)
    layer.eval()(x)
    layer.train()
    with pytest.warns(UserWarning, match="forget every stored pattern"):
        layer(x)
    layer(x)
    layer.reset_parameters()
    assert not layer.hopfield._looked_for_dead


def is_dead(seed: int) -> bool:
    layer = pooling(seed, "relu").eval()
    layer(bags(0))
    return bool((layer.association_matrix == 0).all())


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_dtype_gives_what_float64_gives(dtype, steps):
    for kind in (Hopfield, HopfieldPooling, HopfieldLayer):
        options = {"inject": "input", "on_failure": "ignore"}
        layer = kind(W, num_heads=2, steps=steps, **options)
        x = torch.randn(B, L, W)
        want = layer.double()(x.double())
        out = layer.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        # Weights are .02: what is compared is of that order, and rounding relative to it.
        scale = want.abs().max()
        assert (out.double() - want).abs().max() < 40 * torch.finfo(dtype).eps * scale + 1e-5 * scale


@pytest.mark.parametrize("steps", [1, 3, None])
def test_autocast(steps):
    for options in ({}, {"state_pattern_as_static": True, "hidden_size": 4}, {"forgetting": "pfu"}):
        layer = Hopfield(W, num_heads=2, steps=steps, inject="input", on_failure="ignore", **options)
        x = torch.randn(B, L, W)
        want = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
            out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16
        assert (out.float() - want).abs().max() < 0.05 * want.abs().max()
        assert layer.stored_projection.weight.grad.dtype == torch.float32
        assert layer.last_solution.residual.dtype == torch.float32


# A note inside torch's compiler about a tensor that it inspects.
INSPECTED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@INSPECTED
@pytest.mark.parametrize("steps", [1, 3])
def test_fixed_steps_compile_to_one_graph(steps):
    for kind, options in (
        (Hopfield, {"forgetting": "relu", "dropout": 0.0}),
        (Hopfield, {"beta": [1.0, 2.0], "add_zero_association": True}),
        (HopfieldPooling, {"quantity": 2}),
    ):
        layer = kind(W, num_heads=2, steps=steps, **options)
        x = torch.randn(B, L, W)
        padding = torch.zeros(B, L, dtype=torch.bool)
        padding[0, 1:] = True
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        out = compiled(x, padding)
        assert_close(out, layer(x, padding))
        out.sum().backward()
        assert layer.state_dict()
    torch._dynamo.reset()


@INSPECTED
def test_a_solve_runs_inside_a_compiled_layer():
    layer = Hopfield(W, num_heads=2, steps=None, inject="input")
    x = torch.randn(B, L, W)
    want = layer(x)
    assert_close(torch.compile(layer, backend="aot_eager")(x), want)
    torch._dynamo.reset()


def test_per_sample_gradients_by_torch_func():
    layer = made(steps=2)
    x = torch.randn(B, L, W, dtype=F64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    want = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for name, whole in zip(parameters, want, strict=True):
        assert_close(each[name].sum(0), whole)


def saved_numbers(call) -> int:
    """How many numbers autograd keeps for the backward pass of a call."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    del out
    return sum(sizes.values())


def test_an_equilibrium_keeps_the_memory_of_one_step_however_many_steps_it_took():
    x = torch.randn(4, 64, 32)
    layer = Hopfield(32, num_heads=2, inject="input", beta=1.0)
    for part in (layer.state_projection, layer.stored_projection):
        nn.init.normal_(part.weight, 0.0, 0.3)
    memory = {}
    for steps in (1, 2, 12, None):
        layer.steps = steps
        memory[steps] = saved_numbers(lambda: layer(x))
    assert layer.last_solution.steps.max() > 4
    # One evaluation carries the gradient and the read-out; beside the weights it keeps states.
    assert memory[None] < 1.25 * memory[1] < 0.5 * memory[12]


def test_training_changes_what_is_recalled():
    torch.manual_seed(0)
    layer = HopfieldPooling(W, output_size=1, num_heads=2, steps=None, quantity=1, learn_beta=True)
    x = torch.randn(32, 5, W)
    target = x[:, :, 0].amax(1, keepdim=True)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    exactly(layer.eval()(x), layer(x))
