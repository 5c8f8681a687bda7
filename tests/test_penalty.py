"""The Jacobian penalty against dense Jacobians, finite differences and torchdeq."""

import pytest
import torch
from problems import F64, PROBLEMS, Map, flat, fresh, jacobian, normal, orthogonal
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from hopdeq_lwpf import Termination, fixed_point
from hopdeq_lwpf.solvers.penalty import jacobian_penalty

TIGHT = Termination(rtol=1e-12, atol=1e-14, max_steps=2000)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_penalty(f, z, x, e):
    """|e^T J|^2 / n row by row from the dense Jacobian, in plain Python; z (B, n)."""
    penalties = []
    for b in range(len(z)):
        j = torch.autograd.functional.jacobian(lambda row, b=b: f(row[None], x)[0], z[b]).tolist()
        n = len(j)
        products = [sum(float(e[b, i]) * j[i][k] for i in range(n)) for k in range(n)]
        penalties.append(sum(p * p for p in products) / n)
    return torch.tensor(penalties, dtype=z.dtype)


def tanh_map(w):
    return Map(lambda z, b: torch.tanh(z @ w.T + b))


def test_one_sample_is_the_squared_product_of_the_noise_and_the_dense_jacobian():
    w = normal(4, 4)
    z, shift = normal(3, 4, seed=2), torch.zeros(4, dtype=F64)
    f = tanh_map(w)
    e = torch.randn(3, 4, dtype=F64, generator=noise(5))
    assert_close(jacobian_penalty(f, z, (shift,), generator=noise(5)), slow_penalty(f, z, (shift,), e))


def test_several_samples_are_averaged():
    f, z, x = tanh_map(normal(4, 4)), normal(3, 4, seed=2), (torch.zeros(4, dtype=F64),)
    together = jacobian_penalty(f, z, x, samples=3, generator=noise(5))
    one_generator = noise(5)
    apart = [jacobian_penalty(f, z, x, generator=one_generator) for _ in range(3)]
    assert_close(together, torch.stack(apart).mean(0))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_mean_over_many_samples_is_the_frobenius_norm_of_the_dense_jacobian(name):
    problem = PROBLEMS[name]
    samples = 400
    x = problem.prepare(*problem.arguments)
    draws = torch.stack(
        [jacobian_penalty(problem.f, problem.root, x, generator=noise(i)) for i in range(samples)]
    )
    problems = draws[0].numel()
    numbers = flat(problem.root).numel() // problems
    # Problems do not see each other, so that the norm of the whole batch's Jacobian is the sum of theirs.
    expected = jacobian(problem).square().sum() / (problems * numbers)
    means = draws.reshape(samples, -1).mean(1)
    # Five standard errors of the mean; the seeds are fixed.
    assert abs(means.mean() - expected) <= 5 * means.std() / samples**0.5


def test_the_penalty_of_a_scaled_rotation_is_exact_for_any_noise():
    # |e^T (c Q)|^2 = c^2 |e|^2.
    c, q = 0.7, orthogonal(5)
    f = Map(lambda z, b: c * z @ q.T + b)
    e = torch.randn(3, 5, dtype=F64, generator=noise(3))
    found = jacobian_penalty(f, normal(3, 5), (torch.zeros(5, dtype=F64),), generator=noise(3))
    assert_close(found, c * c * e.square().sum(1) / 5)


@pytest.mark.parametrize("samples", [1, 3])
def test_its_mean_is_what_torchdeq_computes_from_the_same_noise(samples):
    from torchdeq.loss import jac_reg

    w, z = normal(4, 4).float().requires_grad_(), normal(3, 4, seed=2).float()
    f, x = tanh_map(w), (torch.zeros(4),)
    torch.manual_seed(11)
    ours = jacobian_penalty(f, z, x, samples=samples).mean()
    (our_gradient,) = torch.autograd.grad(ours, w)
    point = z.clone().requires_grad_()
    torch.manual_seed(11)
    theirs = jac_reg(f(point, x), point, vecs=samples)
    (their_gradient,) = torch.autograd.grad(theirs, w)
    # Two orders of summing in float32.
    assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_its_gradient_to_parameters_context_and_state_passes_gradcheck():
    def penalty(w, b, z):
        return jacobian_penalty(tanh_map(w), z, (b,), samples=2, generator=noise(1))

    arguments = [t.clone().requires_grad_() for t in (normal(3, 3), normal(3, seed=2), normal(2, 3, seed=3))]
    assert torch.autograd.gradcheck(penalty, arguments)


@pytest.mark.parametrize("name", ["dict", "tuple"])
def test_its_gradient_passes_gradcheck_for_trees_of_tensors(name):
    problem = PROBLEMS[name]
    leaves, spec = pytree.tree_flatten(problem.root)

    def penalty(*tensors):
        z = pytree.tree_unflatten(list(tensors[: len(leaves)]), spec)
        return jacobian_penalty(problem.f, z, problem.prepare(*tensors[len(leaves) :]), generator=noise(1))

    arguments = [leaf.clone().requires_grad_() for leaf in leaves] + list(fresh(problem))
    assert torch.autograd.gradcheck(penalty, arguments)


def test_its_gradient_through_an_equilibrium_is_that_of_solving_again():
    w, b = (0.5 * orthogonal(3)).requires_grad_(), normal(2, 3, seed=3).requires_grad_()

    def penalty(w, b):
        f = Map(lambda z, w, b: torch.tanh(z @ w.T + b))
        z = fixed_point(f, (w, b), torch.zeros(2, 3, dtype=F64), stop=TIGHT).value
        return jacobian_penalty(f, z, (w, b), generator=noise(1))

    assert torch.autograd.gradcheck(penalty, (w, b))


def test_a_detached_state_leaves_out_the_part_through_the_equilibrium():
    cell = nn.Linear(3, 3, dtype=F64)
    nn.init.orthogonal_(cell.weight, 0.5)
    f = Map(lambda z, x: torch.tanh(cell(z) + x))
    x = normal(2, 3)
    z = fixed_point(f, (x,), torch.zeros_like(x), stop=TIGHT).value

    def gradient(state):
        return torch.autograd.grad(
            jacobian_penalty(f, state, (x,), generator=noise(1)).mean(), cell.weight, retain_graph=True
        )[0]

    assert (gradient(z) - gradient(z.detach())).norm() > 1e-3 * gradient(z).norm()


def test_without_gradients_the_value_is_the_same_and_has_no_graph():
    w = normal(4, 4).requires_grad_()
    f, z, x = tanh_map(w), normal(3, 4, seed=2), (torch.zeros(4, dtype=F64),)
    with_graph = jacobian_penalty(f, z, x, generator=noise(5))
    with torch.no_grad():
        without = jacobian_penalty(f, z, x, generator=noise(5))
    assert with_graph.requires_grad
    assert not without.requires_grad
    assert_close(without, with_graph.detach())


def test_its_minimisation_makes_the_jacobian_small():
    torch.manual_seed(0)
    w = nn.Parameter(normal(4, 4))
    f, x, z = tanh_map(w), (torch.zeros(4, dtype=F64),), 0.1 * normal(8, 4)
    optimiser = torch.optim.Adam([w], lr=0.05)
    before = w.norm().item()
    for _ in range(100):
        optimiser.zero_grad()
        jacobian_penalty(f, z, x).mean().backward()
        optimiser.step()
    assert w.norm().item() < 0.5 * before


def test_one_problem_does_not_see_another():
    f, z, x = tanh_map(normal(4, 4)), normal(3, 4, seed=2), (torch.zeros(4, dtype=F64),)
    spoilt = z.clone()
    spoilt[1] = float("nan")
    clean = jacobian_penalty(f, z, x, generator=noise(5))
    found = jacobian_penalty(f, spoilt, x, generator=noise(5))
    assert_close(found[[0, 2]], clean[[0, 2]], rtol=0, atol=0)
    assert found[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_computed_in_float32_or_wider(dtype):
    f = Map(lambda z, b: 0.5 * z + b)
    found = jacobian_penalty(
        f, torch.ones(2, 3, dtype=dtype), (torch.zeros(3, dtype=dtype),), generator=noise(0)
    )
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    e = torch.randn(2, 3, dtype=found.dtype, generator=noise(0))
    # Half a unit in the last place of the products' dtype.
    assert_close(found, 0.25 * e.square().mean(1), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_shapes_empty_batches_and_functions_that_ignore_the_state():
    f = Map(lambda z, b: 0.5 * z + b, state_ndim=1)
    assert jacobian_penalty(f, torch.zeros(2, 3, 4), (0.0,)).shape == (2, 3)
    assert jacobian_penalty(f, torch.zeros(0, 4), (0.0,)).shape == (0,)
    constant = Map(lambda z, b: b.expand_as(z))
    assert jacobian_penalty(constant, torch.ones(2, 3), (torch.ones(3),)).tolist() == [0.0, 0.0]
    assert jacobian_penalty(constant, torch.ones(2, 3), (torch.ones(3).requires_grad_(),)).tolist() == [
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("samples", [0, -1, 1.5, True])
def test_wrong_numbers_of_samples_are_refused(samples):
    with pytest.raises(ValueError, match="samples"):
        jacobian_penalty(Map(lambda z: z), torch.ones(2, 3), (), samples=samples)
