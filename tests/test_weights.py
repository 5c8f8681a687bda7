"""Normalised weights and dropout inside a solve, which needs a fixed map."""

import copy
import warnings

import pytest
import torch
from problems import F64
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

from hopdeq_lwpf import Equilibrium, Termination, fixed_point
from hopdeq_lwpf.solvers.weights import frozen_weights


class Cell(nn.Module):
    def __init__(self, norm, width: int = 6) -> None:
        super().__init__()
        self.recur = norm(nn.Linear(width, width))

    def forward(self, z, x):
        return torch.tanh(0.8 * self.recur(z) + x)


NORMS = {"weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm}


def layer_with(norm: str, **options) -> Equilibrium:
    torch.manual_seed(0)
    return Equilibrium(Cell(NORMS[norm]), **{"stop": Termination(rtol=1e-6), **options})


def test_spectral_norm_in_training_is_no_fixed_map_and_frozen_it_is():
    layer = layer_with("spectral_norm")
    x, z = torch.randn(4, 6), torch.ones(4, 6)
    with torch.no_grad():
        # Its vectors fit the weights of the start; training moves these.
        layer.f.recur.parametrizations.weight.original.normal_()
        assert not torch.equal(layer.f(z, x), layer.f(z, x))
        layer.f.recur.parametrizations.weight.original.normal_()
        with frozen_weights(layer):
            assert torch.equal(layer.f(z, x), layer.f(z, x))


def test_the_residual_of_a_spectrally_normalised_map_is_true_only_while_its_weights_are_frozen():
    torch.manual_seed(0)
    cell = Cell(parametrizations.spectral_norm, 256)
    original = cell.recur.parametrizations.weight.original
    x, stop = 0.3 * torch.randn(64, 256), Termination(rtol=1e-6, max_steps=500)

    def move() -> None:
        original.add_(0.1 * original.std() * torch.randn_like(original))

    def reported_and_now() -> tuple[float, float]:
        solution = fixed_point(cell, x, torch.zeros_like(x), stop=stop)
        image = cell(solution.state, x)
        now = (image - solution.state).norm(dim=1) / image.norm(dim=1)
        return float(solution.residual.max()), float(now.max())

    with torch.no_grad():
        move()
        reported, now = reported_and_now()
        assert now > 10 * reported
        move()
        with frozen_weights(cell):
            reported, now = reported_and_now()
    # The same map in float32.
    assert_close(now, reported, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_frozen_weights_are_computed_once_in_a_solve(norm):
    cell = Cell(NORMS[norm])
    computed = []
    cell.recur.parametrizations.weight[0].register_forward_hook(lambda *_: computed.append(1))
    x = torch.randn(4, 6)
    with frozen_weights(cell):
        fixed_point(cell, x, torch.zeros_like(x))
    assert len(computed) == 1
    fixed_point(cell, x, torch.zeros_like(x))
    assert len(computed) > 3


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_of_frozen_weights_is_that_of_the_normalised_ones(norm):
    layer = layer_with(norm, stop=Termination(rtol=1e-12, max_steps=500)).double().eval()
    x = torch.randn(4, 6, dtype=F64)
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    with frozen_weights(layer):
        out = layer(x)
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert expected[name].norm() > 0
        assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)


def test_the_cache_of_torch_alone_loses_the_gradient():
    # Why frozen_weights computes the weights before the solve does.
    cell, x = Cell(parametrizations.weight_norm), torch.randn(4, 6)
    with parametrize.cached():
        out = fixed_point(cell, x, torch.zeros_like(x)).value
    out.sum().backward()
    assert cell.recur.parametrizations.weight.original1.grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_normalised_layers_train_copy_convert_and_reload(norm):
    layer = layer_with(norm)
    x, target = torch.randn(16, 6), 0.3 * torch.randn(16, 6)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        with frozen_weights(layer):
            loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    layer.eval()
    twin = copy.deepcopy(layer)
    other = layer_with(norm).eval()
    other.load_state_dict(layer.state_dict())
    expected = layer(x)
    assert_close(twin(x), expected)
    assert_close(other(x), expected)
    # float32 and float64 solves agree to the tolerance of the solve.
    assert_close(twin.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_the_norms_of_torchdeq_train_within_an_equilibrium(norm):
    from torchdeq.norm import apply_norm, reset_norm

    torch.manual_seed(0)
    layer = Equilibrium(Cell(lambda module: module), stop=Termination(rtol=1e-6))
    apply_norm(layer.f, norm)
    x, target = torch.randn(16, 6), 0.3 * torch.randn(16, 6)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        reset_norm(layer)
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    # Their weight is a tensor with history until it is computed without gradients.
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(layer)
    with torch.no_grad():
        reset_norm(layer.eval())
    expected = layer(x)
    assert_close(copy.deepcopy(layer)(x), expected)
    wide = copy.deepcopy(layer).double()
    with torch.no_grad():
        reset_norm(wide)
    assert_close(wide(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


def test_a_dropout_mask_drawn_before_the_solve_leaves_a_fixed_map():
    class Dropped(nn.Module):
        def prepare(self, x):
            return x, nn.functional.dropout(torch.ones_like(x), 0.3, self.training)

        def init(self, context):
            return torch.zeros_like(context[0])

        def forward(self, z, context):
            x, mask = context
            return torch.tanh(0.5 * mask * z + x)

    layer = Equilibrium(Dropped(), on_failure="raise")
    x = torch.randn(8, 6)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_variational_dropout_of_torchdeq_is_frozen_until_it_is_reset():
    from torchdeq.dropout import VariationalDropout, reset_dropout

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = VariationalDropout(0.3)

        def forward(self, z, x):
            return torch.tanh(0.5 * self.drop(z) + x)

    layer = Equilibrium(Dropped(), on_failure="raise")
    x = torch.randn(8, 6)
    first = layer(x)
    assert torch.equal(layer(x), first)
    reset_dropout(layer)
    assert not torch.equal(layer(x), first)


def test_plain_dropout_in_f_never_converges_and_says_so():
    class Dropped(nn.Module):
        def forward(self, z, x):
            return torch.tanh(0.5 * nn.functional.dropout(z, 0.3, self.training) + x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.warns(UserWarning, match="did not converge"):
            Equilibrium(Dropped())(torch.randn(8, 6))
