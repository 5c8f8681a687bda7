"""Warm starts by sample index."""

import copy
import pickle

import pytest
import torch
from problems import F64, TIGHT, normal
from torch import nn
from torch.testing import assert_close

from hopdeq_lwpf import Equilibrium, Termination
from hopdeq_lwpf.solvers import Implicit, WarmStart


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4).double()
        nn.init.orthogonal_(self.inner.weight, 0.8)

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + x)


def layer(**options):
    return Equilibrium(Cell(), **{"warm_start": True, "solver": "picard", **options})


def samples(*numbers):
    return torch.tensor(numbers)


def test_a_known_sample_needs_no_more_steps():
    module, x = layer(), normal(3, 4)
    first = module(x, index=samples(7, 2, 9), return_solution=True)
    again = module(x, index=samples(7, 2, 9), return_solution=True)
    assert (first.steps > 5).all()
    assert (again.steps == 0).all()
    assert_close(again.value, first.value)


def test_samples_are_told_apart_whatever_their_place_in_the_batch():
    module, x = layer(), normal(4, 4)
    module(x[:3], index=samples(0, 1, 2))
    mixed = module(x[[3, 2, 0]], index=samples(3, 2, 0), return_solution=True)
    assert (mixed.steps[1:] == 0).all()
    assert mixed.steps[0] > 5
    assert len(module.warm) == 4


def test_a_moved_equilibrium_is_found_in_fewer_steps_and_is_the_same_as_from_a_cold_start():
    warm, x = layer(stop=TIGHT), normal(6, 4)
    warm(x, index=torch.arange(6))
    with torch.no_grad():
        warm.f.inner.weight.mul_(0.999)
    moved = warm(x, index=torch.arange(6), return_solution=True)
    cold = warm(x, return_solution=True)
    assert (moved.steps < cold.steps).all()
    assert_close(moved.value, cold.value, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_that_of_a_cold_start():
    def gradient(times):
        module = layer(stop=TIGHT, adjoint=Implicit(rtol=1e-12))
        for _ in range(times):
            module.zero_grad()
            module(normal(5, 4), index=torch.arange(5)).pow(2).sum().backward()
        return [p.grad for p in module.parameters()]

    assert_close(gradient(2), gradient(1), rtol=1e-9, atol=1e-11)


def test_where_there_are_two_equilibria_it_stays_with_the_one_it_has():
    # z = tanh(3 z + x): x = +-.1 decides at a cold start from 0, the last equilibrium at a warm one.
    module = Equilibrium(lambda z, x: torch.tanh(3 * z + x), warm_start=True, solver="picard")
    x = torch.tensor([[0.1]], dtype=F64)
    assert module(x, index=samples(0)).item() > 0.9
    assert module(-x).item() < -0.9
    assert module(-x, index=samples(0)).item() > 0.9
    module.warm.clear()
    assert module(-x, index=samples(0)).item() < -0.9


def test_what_did_not_converge_is_not_kept():
    module = layer(stop=Termination(rtol=1e-12, max_steps=3), on_failure="ignore")
    module(torch.cat([normal(1, 4), torch.full((1, 4), torch.nan, dtype=F64)]), index=samples(0, 1))
    assert len(module.warm) == 0


def test_a_nan_in_a_later_epoch_does_not_replace_the_equilibrium():
    module, x = layer(on_failure="ignore"), normal(1, 4)
    value = module(x, index=samples(4))
    module(x * torch.nan, index=samples(4))
    assert_close(module(x, index=samples(4)), value)


def test_pytree_states_of_any_dtype():
    def f(z, x):
        return {"a": 0.5 * z["a"] + x, "b": (0.5 * z["b"].float() + x[:, :1].float()).to(z["b"].dtype)}

    x = torch.rand(2, 3)
    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1, dtype=torch.bfloat16)}
    module = Equilibrium(f, warm_start=True, solver="picard", stop=Termination(rtol=1e-2))
    first = module(x, z0, index=samples(5, 6))
    again = module(x, z0, index=samples(5, 6), return_solution=True)
    assert (again.steps == 0).all()
    assert_close(again.value, first)


def test_capacity_grows_without_losing_samples():
    module, x = layer(), normal(50, 4)
    for start in range(0, 50, 5):
        module(x[start : start + 5], index=torch.arange(start, start + 5))
    assert len(module.warm) == 50
    assert (module(x, index=torch.arange(50), return_solution=True).steps == 0).all()


def test_another_dtype_and_several_problems_a_sample():
    class Scaled(Cell):
        state_ndim = 1

    module = Equilibrium(Scaled(), warm_start=True, solver="picard")
    x = normal(3, 2, 4)
    module(x, index=torch.arange(3))
    module.float()
    again = module(x.float(), index=torch.arange(3), return_solution=True)
    assert again.value.dtype == torch.float32
    assert (again.steps <= 1).all()
    assert len(module.warm) == 3


def test_an_empty_batch_and_copies():
    module, x = layer(), normal(2, 4)
    module(x[:0], index=samples().long())
    module(x, index=samples(0, 1))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (twin(x, index=samples(0, 1), return_solution=True).steps == 0).all()
        twin.warm.clear()
    assert len(module.warm) == 2
    assert not any("warm" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m(x, index=[0, 1]), TypeError, "index must be an integer tensor.*got list"),
        (lambda m, x: m(x, index=torch.zeros(2)), TypeError, "got torch.float32"),
        (lambda m, x: m(x, index=samples(0)), ValueError, r"index must have shape \(B,\).*got \(1,\)"),
        (lambda m, x: m(x, index=samples(3, 3)), ValueError, "holds a sample twice"),
        (lambda m, x: Equilibrium(m.f)(x, index=samples(0, 1)), ValueError, "warm_start=True"),
        (lambda m, x: layer(adjoint="unrolled"), ValueError, "next to no steps to differentiate"),
        (lambda m, x: layer(steps=2), ValueError, "steps=2 there is none"),
        (lambda m, x: torch.vmap(lambda x: m(x, index=samples(0)))(x[:, None]), TypeError, "torch.func"),
    ],
)
def test_wrong_use_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(layer(), normal(2, 4))


def test_states_of_another_width_are_named():
    store = WarmStart()
    module = Equilibrium(lambda z, x: 0.5 * z + x, warm_start=True, solver="picard")
    solution = module(normal(2, 4), return_solution=True)
    store.keep(samples(0, 1), solution)
    with pytest.raises(ValueError, match=r"\[\(5,\)\] a sample, but those kept so far have \[\(4,\)\]"):
        store.start(samples(0, 1), normal(2, 5))
