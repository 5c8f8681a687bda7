"""The Hopfield layer against its slow twin, option by option; energy, what it keeps of a call, copies, beta."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from references import exactly
from references_hopfield import F64, OPTIONS, PLAIN, B, L, S, agrees, made
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import ConvergenceError, Termination
from hopdeq_lwpf.forgetting import PFU
from hopdeq_lwpf.models import Hopfield


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_what_the_twin_gives(name):
    layer, twin, parts = made(OPTIONS[name])
    agrees(layer, twin, parts, {})
    assert layer.get_projected_pattern_matrix(parts).shape[1] == twin.w["heads"]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_with_more_steps_masks_and_forgetting(name):
    ignored = torch.rand(B, 1, 1, S) < 0.4
    ignored[..., 0] = False
    added = torch.randn(L, S, dtype=F64)
    full = {"ignored": ignored.expand(B, 2, L, S), "added": added.expand(B, 2, L, S)}
    masks = {"stored_pattern_padding_mask": ignored[:, 0, 0], "association_mask": added}
    for unit in (None, "relu", "pfu"):
        layer, twin, parts = made({**OPTIONS[name], "update_steps_max": 2}, forgetting=unit)
        agrees(layer, twin, parts, masks, steps=3, **full)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_equilibrium_is_where_the_twin_ends(name):
    # Twenty updates leave less than the tolerance: what the query pulls keeps the states apart.
    stop = Termination(rtol=1e-12, atol=1e-12, max_steps=1000)
    layer, twin, parts = made({**OPTIONS[name], "update_steps_max": None}, inject="input", stop=stop)
    out, _ = twin(*(part.tolist() for part in parts), steps=100, pull=1.0)
    assert_close(layer(parts), out, rtol=1e-7, atol=1e-7)
    assert layer.last_solution.converged.all()


def test_one_tensor_is_all_three_inputs_and_a_batch_of_one_serves_all():
    layer = Hopfield(4, num_heads=2)
    x = torch.randn(B, S, 4)
    exactly(layer(x), layer((x, x, x)))
    exactly(layer([x, x, x]), layer(x))
    shared = x[:1]
    assert_close(layer((shared, x, shared)), layer((shared.expand(B, -1, -1), x, shared.expand(B, -1, -1))))


def test_batch_second_is_the_same_layer_transposed():
    first = Hopfield(4, num_heads=2, steps=3)
    second = Hopfield(4, num_heads=2, steps=3, batch_first=False)
    second.load_state_dict(first.state_dict())
    x = torch.randn(B, S, 4)
    padding = torch.rand(B, S) < 0.3
    padding[:, 0] = False
    exactly(second(x.transpose(0, 1), padding), first(x, padding).transpose(0, 1))


@torch.no_grad()
def test_after_a_call_the_layer_says_what_it_did():
    layer, _, parts = made({"num_heads": 2})
    assert layer.q is None
    assert layer.last_solution is None
    for steps in (1, 3, None):
        layer.steps = steps
        out = layer(parts)
        q, k, v = layer.q, layer.k, layer.v
        assert (q.shape, k.shape, v.shape) == ((B, 2, L, 2), (B, 2, S, 2), (B, 2, S, 2))
        solution = layer.last_solution
        read = (layer.association_matrix @ v).transpose(1, 2).flatten(2)
        assert_close(solution.value.transpose(1, 2).flatten(2), read)
        assert_close(layer.output_projection(read), out)
        assert not solution.value.requires_grad
        # The state after k steps is k^T w, and the residual that of the last step.
        z = q
        for _ in range(steps or 100):
            before, z = z, torch.softmax(z @ k.mT / math.sqrt(2), -1) @ k
        assert_close(solution.state, z, rtol=1e-4, atol=1e-6)
        if steps is not None:
            assert_close(solution.residual, (z - before).norm(dim=-1) / z.norm(dim=-1))
            assert (solution.steps == steps).all()
        energy = 0.5 * z.square().sum(-1) - math.sqrt(2) * torch.logsumexp(z @ k.mT / math.sqrt(2), -1)
        assert_close(layer.energy, energy, rtol=1e-4, atol=1e-6)
    assert solution.converged.all()


def test_the_energy_of_a_biased_association_has_the_update_as_its_gradient():
    for unit in (None, "relu", "pfu"):
        layer, _, parts = made({"num_heads": 2}, forgetting=unit, inject="input")
        heads = layer._project(parts, None, torch.randn(L, S, dtype=F64))
        x = layer.f.prepare(heads)
        z = torch.randn_like(heads.q).requires_grad_()
        (slope,) = torch.autograd.grad(layer.f.energy(z, x).sum(), z)
        assert_close(layer.f(z, x) - z, -slope)


def test_plain_iteration_never_raises_the_energy_of_a_biased_association():
    layer, _, parts = made({"num_heads": 2, "scaling": torch.tensor([4.0, 9.0])}, forgetting="relu")
    x = layer.f.prepare(layer._project(parts, None, torch.randn(L, S, dtype=F64)))
    z = layer.f.init(x)
    for _ in range(20):
        after = layer.f(z, x)
        assert (layer.f.energy(after, x) <= layer.f.energy(z, x) + 1e-12).all()
        z = after


def test_an_unconverged_solve_warns_raises_or_passes_as_asked():
    x = 3 * torch.randn(B, S, 4)
    stop = Termination(rtol=1e-7, atol=0.0, max_steps=1)
    options = {"steps": None, "stop": stop, "inject": "input", "normalize_hopfield_space": True, "beta": 4.0}
    with pytest.warns(UserWarning, match="did not converge"):
        Hopfield(4, **options)(x)
    with pytest.raises(ConvergenceError, match="raise max_steps"):
        Hopfield(4, on_failure="raise", **options)(x)
    assert not Hopfield(4, on_failure="ignore", **options)(x).isnan().any()


def test_copies_files_and_pickles_give_the_same_layer():
    x = torch.randn(B, S, 4)
    for options in (
        {"beta": [1.0, 2.0]},
        {"learn_beta": True, "steps": 2},
        {"steps": None, "inject": "input"},
    ):
        layer = Hopfield(4, num_heads=2, forgetting="pfu", **options)
        out = layer(x)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            exactly(copied(x), out)
            assert copied.beta is not layer.beta or isinstance(layer.beta, float)
        other = Hopfield(4, num_heads=2, forgetting="pfu", **options)
        other.load_state_dict(layer.state_dict())
        exactly(other(x), out)


def test_beta_may_be_a_number_a_tensor_a_list_or_learned():
    x = torch.randn(B, S, 4)
    want = Hopfield(4, num_heads=2, beta=2.0)
    for beta in (2, torch.tensor(2.0), [2.0, 2], torch.tensor([2.0, 2.0]), nn.Parameter(torch.tensor(2.0))):
        layer = Hopfield(4, num_heads=2, beta=beta)
        layer.load_state_dict(want.state_dict(), strict=False)
        assert_close(layer(x), want(x))
    learned = Hopfield(4, num_heads=2, beta=nn.Parameter(torch.tensor([1.0, 2.0])))
    assert "equilibrium.f.beta" in dict(learned.named_parameters())
    layer = Hopfield(4, num_heads=2, learn_beta=True, steps=2)
    assert_close(layer.beta.data, torch.full((2,), 2**-0.5))
    for part in (layer.state_projection, layer.stored_projection):
        nn.init.normal_(part.weight)
    layer(x).square().sum().backward()
    assert (layer.beta.grad.abs() > 0).all()


def test_dropout_acts_on_the_association_of_the_readout_alone_and_only_in_training():
    layer = Hopfield(4, num_heads=2, dropout=0.5, steps=3, disable_out_projection=True)
    x = torch.randn(64, S, 4)
    exactly(layer.eval()(x), layer(x))
    mean = layer(x)
    layer.train()
    out = layer(x)
    assert_close(layer.association_matrix.sum(-1), torch.ones(64, 2, S))
    assert (out - mean).abs().max() > 1e-3
    many = torch.stack([layer(x) for _ in range(300)])
    # 300 draws of relative spread about 1: three standard errors of the mean over some 1000 numbers.
    assert ((many.mean(0) - mean).abs() / mean.abs().mean()).mean() < 3 / math.sqrt(300)


def test_activation_by_name_or_as_a_function():
    x = torch.randn(B, S, 4)
    layer = Hopfield(4)
    for activation in ("tanh", torch.tanh, "softsign"):
        other = Hopfield(4, association_activation=activation)
        other.load_state_dict(layer.state_dict())
        assert_close(other(x), (nn.functional.softsign if activation == "softsign" else torch.tanh)(layer(x)))


def test_the_signature_names_every_option():
    parameters = inspect.signature(Hopfield).parameters
    assert list(parameters)[:5] == ["input_size", "hidden_size", "output_size", "pattern_size", "num_heads"]
    assert parameters["steps"].default == 1
    assert len(parameters) > 40


def test_plain_retrieval_is_the_layer_without_any_weights():
    plain = {name: False for name in PLAIN}
    layer = Hopfield(
        steps=None, beta=8.0, stored_pattern_as_static=True, state_pattern_as_static=True, inject="start",
        pattern_projection_as_static=True, disable_out_projection=True, **plain,
    )  # fmt: skip
    assert not list(layer.parameters())
    patterns = nn.functional.normalize(torch.randn(1, 16, 32), dim=-1)
    recalled = layer((patterns, patterns + 0.05 * torch.randn(1, 16, 32), patterns))
    assert (torch.cdist(recalled[0], patterns[0]).argmin(1) == torch.arange(16)).all()


def test_a_unit_draws_its_noise_once_a_call():
    layer = Hopfield(4, forgetting=PFU(noise=1.0, generator=torch.Generator().manual_seed(0)), steps=None)
    layer.equilibrium.f.inject = "input"
    x = torch.randn(B, S, 4)
    layer(x)
    assert layer.last_solution.converged.all()
    weights = layer.association_matrix
    exactly(layer.association_matrix, weights)
    assert (layer.get_association_matrix(x) != weights).any()


def test_forgetting_only_at_the_readout_leaves_the_steps_before_it_unmasked():
    layer, _, parts = made(
        {"num_heads": 2, **PLAIN}, forgetting="relu", mask_in_loop=False, inject_weight=0.5
    )
    layer.eval()
    for inject, pull in (("start", 0.0), ("input", 0.5)):
        layer.f.inject = inject
        layer.steps = 2
        out = layer(parts)
        q, k, v = layer.q, layer.k, layer.v
        z = torch.softmax((q @ k.mT / math.sqrt(2)).relu(), -1) @ k + pull * q
        scores = z @ k.mT / math.sqrt(2)
        weights = torch.softmax(scores.relu(), -1) * (scores > 0)
        assert_close(layer.association_matrix, weights)
        assert_close(out, layer.output_projection((weights @ v).transpose(1, 2).flatten(2)))
        assert layer.energy is None
