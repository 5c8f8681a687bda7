"""Energies fall, metrics make Jacobians self-adjoint: for every Lagrangian and unit that says so."""

import pytest
import torch
from hierarchical_networks import F64, GRAPHS, function, problem
from references import UNITS
from test_lagrangians import EVERY
from torch.testing import assert_close

from hopdeq_lwpf._types import identity
from hopdeq_lwpf.forgetting import PFU, ReLU, TopK
from hopdeq_lwpf.models.hierarchical import CHNFunction, HAMFunction


@pytest.mark.parametrize("even_odd", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_the_energy_of_a_ham_has_the_gradient_slope_times_s_minus_f(name, even_odd):
    # dE/drho = s - f(s), eq. 4, times drho/ds.
    f = function(HAMFunction, GRAPHS["5 layers, skips"], lagrangian=EVERY[name], even_odd=even_odd)
    x, z = problem(f)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(f.energy(z, x).sum(), z)
    (slope,) = torch.autograd.grad(torch.cat([*f._activated(f._split(z), x).values()], -1), z, z - f(z, x))
    assert_close(gradient, slope, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_the_residual_of_a_chn_is_minus_the_gradient_of_its_energy(name):
    f = function(CHNFunction, GRAPHS["5 layers, skips"], lagrangian=EVERY[name], damping=0.0)
    x, z = problem(f)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(f.energy(z, x).sum(), z)
    assert_close(f(z, x) - z, -gradient, rtol=1e-9, atol=1e-10)


def fall(f, x, z, steps):
    """The largest rise of the energy in any of so many plain steps, and how much it fell in all."""
    before = first = f.energy(z, x)
    worst = torch.full_like(before, -torch.inf)
    with torch.no_grad():
        for _ in range(steps):
            z = f(z, x)
            energy = f.energy(z, x)
            worst, before = torch.maximum(worst, energy - before), energy
    return worst.max(), (first - before).min()


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.has_energy], ids=repr)
def test_no_plain_even_odd_step_raises_the_energy(unit):
    count = 0
    for name, lagrangian in EVERY.items():
        f = function(HAMFunction, GRAPHS["4 layers"], lagrangian=lagrangian, forgetting=unit, even_odd=True)
        if f.has_energy:
            count += 1
            x, z = problem(f, batch=20)
            worst, fell = fall(f, x, z, 25)
            assert worst < 1e-12, name
            assert fell > 1e-3
    assert count >= 5


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "relu", "identity", "softmax"])
def test_damping_by_the_bound_of_the_docstring_makes_every_one_matrix_step_descend(name):
    # None of these rho' exceeds 1. Weights are large enough that undamped steps do not descend.
    options = {"lagrangian": name, "scale": 0.5 if name == "identity" else 1.5}
    f = function(HAMFunction, GRAPHS["7 layers"], **options)
    x, z = problem(f, batch=20)
    blocks = torch.zeros(z.shape[-1], z.shape[-1], dtype=F64)
    at = {i: sum(f.graph.widths[1:i]) for i in f.graph.free}
    for i, j in f.graph.pairs:
        if i:
            here, there = slice(at[j], at[j] + f.graph.widths[j]), slice(at[i], at[i] + f.graph.widths[i])
            blocks[here, there] = f.weights[f"{i}_{j}"].detach()
    norm = torch.linalg.matrix_norm(blocks + blocks.T, 2)
    f.damping = float(1 - 1 / (1 + norm / 2))
    worst, fell = fall(f, x, z, 60)
    assert worst < 1e-12
    assert fell > 1e-3
    if name in ("sigmoid", "relu"):
        f.damping = 0.0
        assert fall(f, x, z, 60)[0] > 1e-3, "the bound would say nothing if undamped steps descended too"


@pytest.mark.parametrize("kind", [HAMFunction, CHNFunction])
@pytest.mark.parametrize("name", EVERY)
def test_small_euler_steps_lower_the_energy(kind, name):
    f = function(kind, GRAPHS["5 layers, skips"], lagrangian=EVERY[name], damping=0.999)
    assert f.has_energy
    x, z = problem(f, batch=10)
    if kind is CHNFunction:
        z = 0.5 * z
    worst, fell = fall(f, x, z, 200)
    assert worst < 1e-12
    assert fell > 1e-3


@pytest.mark.parametrize("unit", [ReLU(), PFU(), TopK(2)], ids=repr)
def test_small_euler_steps_lower_the_energy_with_forgetting(unit):
    f = function(HAMFunction, GRAPHS["4 layers"], forgetting=unit, damping=0.999)
    assert f.has_energy
    x, z = problem(f, batch=10)
    worst, fell = fall(f, x, z, 200)
    assert worst < 1e-12
    assert fell > 1e-3


@pytest.mark.parametrize("even_odd", [False, True])
def test_evaluations_hold_step_energy_and_how_many_neurons_are_kept(even_odd):
    f = function(
        HAMFunction, GRAPHS["5 layers, skips"], forgetting={1: "relu", 2: TopK(2)}, even_odd=even_odd
    )
    x, z = problem(f, batch=4)
    image, energy, piece = f.evaluate(z, x)
    assert_close(image, f(z, x), rtol=0, atol=0)
    assert_close(energy(), f.energy(z, x), rtol=0, atol=0)
    expected = (f.states(z, x)[0] > 0).sum(-1) + 2
    assert piece.tolist() == expected.tolist()
    assert len(set(piece.tolist())) > 1
    plain = function(HAMFunction, GRAPHS["5 layers, skips"], even_odd=even_odd)
    assert plain.evaluate(z, problem(plain, batch=4)[0])[2] is None


def test_has_energy_is_honest_about_units():
    def says(kind, unit, lagrangian="sigmoid"):
        return function(kind, GRAPHS["4 layers"], forgetting=unit, lagrangian=lagrangian).has_energy

    assert says(HAMFunction, "relu")
    assert not says(HAMFunction, "relu", "tanh")
    assert not says(HAMFunction, PFU(0.2, -1.0))
    assert says(CHNFunction, None)
    assert not says(CHNFunction, "relu")


def jacobian(f, z, x):
    def rows_of(flat):
        return f(flat.reshape(1, -1), x)[0]

    return torch.autograd.functional.jacobian(rows_of, z[0])


@pytest.mark.parametrize("even_odd", [False, True])
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "steep tanh", "identity"])
def test_the_jacobian_of_a_ham_is_self_adjoint_in_its_metric(name, even_odd):
    f = function(
        HAMFunction, GRAPHS["5 layers, skips"], lagrangian=EVERY[name], even_odd=even_odd, damping=0.2
    )
    x, z = problem(f, batch=1)
    j = jacobian(f, z, x)
    m = torch.stack([f.metric(z, x)(e[None])[0] for e in torch.eye(j.shape[0], dtype=F64)])
    assert_close(m @ j, (m @ j).T, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(m).min() > 0
    if name != "identity":
        assert (j - j.T).abs().max() > 1e-3, "the metric would say nothing of a symmetric Jacobian"
    else:
        assert f.metric(z, x) is identity


def test_a_metric_that_could_be_singular_is_not_declared():
    for options in ({"lagrangian": "relu"}, {"lagrangian": "softmax"}, {"forgetting": "relu"}):
        f = function(HAMFunction, GRAPHS["3 layers"], **options)
        x, z = problem(f)
        assert f.metric(z, x) is None


def test_odd_layers_may_be_singular_in_the_even_odd_form():
    # Linear visible neurons over a layer that forgets: the metric of retrieval.
    f = function(
        HAMFunction,
        GRAPHS["3 layers"],
        lagrangian={1: "softmax", 2: "identity"},
        forgetting="pfu",
        even_odd=True,
    )
    x, z = problem(f, batch=1)
    assert f.metric(z, x) is identity
    j = jacobian(f, z, x)
    assert j.abs().max() > 1e-3
    assert_close(j, j.T, rtol=1e-9, atol=1e-12)
    tracked = function(
        HAMFunction,
        GRAPHS["3 layers"],
        lagrangian={1: "softmax", 2: "identity"},
        forgetting=PFU(tracked=True),
        even_odd=True,
    )
    assert tracked.metric(z, problem(tracked, batch=1)[0]) is None


@pytest.mark.parametrize("name", EVERY)
def test_the_jacobian_of_a_chn_is_symmetric(name):
    f = function(CHNFunction, GRAPHS["5 layers, skips"], lagrangian=EVERY[name], damping=0.3)
    x, z = problem(f, batch=1)
    assert f.metric(z, x) is identity
    j = jacobian(f, z, x)
    assert_close(j, j.T, rtol=1e-9, atol=1e-10)
    assert f.in_form(True).metric(z, x) is None
